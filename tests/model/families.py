"""Tiny random causal language models of transformers, one entry per family.

Knows: the whole catalogue, as `FAMILIES`, and which of it is tested at every change.
Does not know: how kvloom runs a model; it is the oracle's side of the tests.
"""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.model.families_base import VOCABULARY, WINDOW, Family, build
from tests.model.families_dense import DENSE
from tests.model.families_moe import MOE
from tests.model.families_other import OTHER

__all__ = ["FAMILIES", "VOCABULARY", "WINDOW", "Family", "build", "parameters"]

FAMILIES: tuple[Family, ...] = DENSE + MOE + OTHER

# Beside the dense ones: the best known mixtures, and one or two for every way to be unusual.
COMMON = {
    *(entry.name for entry in DENSE),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "mimo_v2_flash", "laguna"),
    *("gpt2", "opt", "whisper", "gemma3n_text", "phimoe_window_far", "diffllama"),
    *("llama4_text_far", "axk2", "axk2_far", "minimax_m3_sparse_64", "doge_far", "deepseek_v4"),
    *("bloom", "falcon", "bart", "roberta", "mamba", "jamba", "lfm2", "qwen3_next", "inkling_text"),
}


def parameters(entries: Iterable[Family]) -> list[Any]:
    """Return test parameters for families, the less common ones marked as long."""
    return [
        pytest.param(
            entry, id=entry.name, marks=() if entry.name in COMMON else (pytest.mark.long,)
        )
        for entry in entries
    ]
