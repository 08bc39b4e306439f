"""How far results may lie from their oracles, one table per number format.

Knows: tolerances by what is compared, absolute ones and shares of what enters.
Does not know: any test.
"""

TOLERANCE = {
    "float32": {
        "logprobs": 1e-5,
        "probabilities": 1e-5,
        "rotation": 1e-5,
        "attention": 1e-5,
        "best two logits": 1e-3,
        "logits": 1e-4,
        "observed rows": 1e-5,
    },
    "bfloat16": {
        "attention": 5e-2,
        "logits": 6e-2,
        "twin logits": 1e-2,
    },
    # Rounding in fp32 turns a row's code now and then, and each turned code goes its own way.
    "int8": {
        "twin logits": 3e-2,
    },
    "int4": {
        "twin logits": 3e-2,
    },
    # Keys and values in codes, beside fp32 weights.
    "int8 KV": {
        "attention": 5e-2,
        "logits": 6e-2,
    },
    "float16": {
        "attention": 5e-3,
    },
    # The embedded model as it runs by default, beside fp32: a share, and a least share.
    "default model": {
        "likelihood": 5e-3,
        "agreement": 0.95,
    },
}

RELATIVE = {
    "norm": 2e-6,
    "gate": 2e-6,
    "product": 1e-6,
    "bfloat16 product": 2e-6,
}
"""Errors of fp32 operations, as shares of the magnitudes that enter them."""
