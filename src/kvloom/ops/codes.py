"""Codes: rows of keys or values as int8 with a scale per row, and the way back.

Knows: how a row is rounded, bit for bit as the compiled executor rounds it.
Does not know: where codes are kept.

A row is one slot of one KV head, so that what it becomes depends on nothing but itself: not on its
neighbours, on how a document was cut, or on where it stands now (ADR 0012).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEAST = 1e-35
"""Rows whose largest magnitude is below become zeros: their scale would be no normal number."""


class Coded(NamedTuple):
    """Rows as codes.

    Attributes:
        codes: int8 (g, s, d).
        scales: fp32 (g, s).
    """

    codes: Int8[Tensor, "g s d"]
    scales: Float[Tensor, "g s"]


def encode(rows: Float[Tensor, "g s d"]) -> Coded:
    """Round rows: the largest magnitude of each becomes 127, ties go to even.

    A row that holds something that is no finite number gets such a scale, and comes back as NaN.
    """
    rows = rows.float()
    most = rows.abs().amax(-1)
    scales = torch.where(most < LEAST, torch.zeros(()), most / 127)
    can_be_coded = (scales > 0) & scales.isfinite()
    quotients = rows / torch.where(can_be_coded, scales, torch.ones(()))[..., None]
    codes = torch.where(can_be_coded[..., None], quotients.round(), torch.zeros(()))
    return Coded(codes.to(torch.int8), scales)


def decode(coded: Coded) -> Float[Tensor, "g s d"]:
    """Return codes times scales in fp32."""
    return coded.codes.float() * coded.scales[..., None]
