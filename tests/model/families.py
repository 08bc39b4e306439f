"""Tiny random causal language models of transformers, one entry per family.

Knows: the whole catalogue, as `FAMILIES`.
Does not know: how kvloom runs a model; it is the oracle's side of the tests.
"""

from tests.model.families_base import VOCABULARY, WINDOW, Family, build
from tests.model.families_dense import DENSE
from tests.model.families_moe import MOE
from tests.model.families_other import OTHER

__all__ = ["FAMILIES", "VOCABULARY", "WINDOW", "Family", "build"]

FAMILIES: tuple[Family, ...] = DENSE + MOE + OTHER
