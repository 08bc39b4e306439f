"""Reuse: which computed KV answers for which tokens."""
