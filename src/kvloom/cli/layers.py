"""Describes a model's layers as plain data, equal ones together.

Knows: what a probe finds out about a layer, and how a rotary table is said in few words.
Does not know: how any of it was found out, or how it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kvloom.types import LayerSpec, Rope


def describe_layers(layers: Sequence[LayerSpec]) -> list[dict[str, Any]]:
    """Return one entry per kind of layer, in the order of first appearance."""
    kinds: dict[LayerSpec, list[int]] = {}
    for layer in layers:
        kinds.setdefault(replace(layer, index=0), []).append(layer.index)
    return [{**asdict(kind), "index": numbers} for kind, numbers in kinds.items()]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short, such as `0-4, 6`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def rope_words(rope: Rope | None) -> str:
    """Return what a rotation turns and how fast, in few words."""
    if rope is None:
        return "none"
    last = rope.first_dim + rope.num_dims - 1
    words = f"{rope.layout}, dims {rope.first_dim}-{last}, {_table_words(rope)}"
    return words if rope.scaling == 1 else f"{words}, scaling {rope.scaling:.4g}"


def _table_words(rope: Rope) -> str:
    base = rope_base(rope.inv_freq)
    if base is not None:
        return f"base {base:,.6g}"
    return f"own table {max(rope.inv_freq):.3g} to {min(rope.inv_freq):.3g}"


def rope_base(inv_freq: Sequence[float]) -> float | None:
    """Return the base of a plain rotary table, whose i-th of n frequencies is base^(-i/n).

    Any other table, such as one stretched for long texts, has none.
    Source: Su et al., RoFormer (2021), section 3.2.2.
    """
    count = len(inv_freq)
    if count < 2 or not all(frequency > 0 for frequency in inv_freq):
        return None
    step = math.log(inv_freq[0] / inv_freq[-1]) / (count - 1)
    plain = all(
        math.isclose(frequency, math.exp(-step * place), rel_tol=1e-4)
        for place, frequency in enumerate(inv_freq)
    )
    return math.exp(step * count) if plain else None
