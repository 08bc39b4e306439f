"""The store: computed KV that outlives requests and processes, found again by what it is.

Knows: chunks, their names, and the tiers that keep them.
Does not know: pools, documents or models; it handles plain data.
"""
