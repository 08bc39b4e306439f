"""The OpenAI-compatible HTTP server.

Knows: HTTP, the OpenAI wire format, limits and metrics.
Does not know: models, memory or scheduling; it stands on the asynchronous engine alone.
"""
