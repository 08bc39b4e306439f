"""From logits to tokens and from tokens to text, for sequences that know nothing of each other.

Knows: sampling, penalties, log-probabilities, incremental text, stop conditions.
Does not know: models, KV memory, the order in which sequences run.
"""
