"""The scheduler: which sequences run how many rows in the next step; plain Python over counts."""
