"""How far results may lie from their oracles, one table per number format.

Knows: absolute tolerances by what is compared.
Does not know: any test.
"""

TOLERANCE = {
    "float32": {
        "logprobs": 1e-5,
        "probabilities": 1e-5,
    },
}
