"""From the name of a model to loaded weights, a tokenizer, a probe and a runner.

Knows: transformers, GGUF, safetensors and the Hugging Face hub; no other room does.
Does not know: requests, schedules, or what a document is used for.
"""
