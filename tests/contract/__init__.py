"""One suite per protocol: what every codec, policy, edit and segment must do."""
