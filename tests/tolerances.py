"""How far results may lie from their oracles, one table per number format.

Knows: absolute tolerances by what is compared.
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
    },
    "bfloat16": {
        "attention": 5e-2,
        "logits": 6e-2,
    },
    "float16": {
        "attention": 5e-3,
    },
}
