"""Reads rotary modules: which rotation their tables stand for, and up to which length.

Knows: tables of cos and sin, and the ways in which they are arranged.
Does not know: models or layers; the probe decides which rotation a layer has.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.model.hooks import RotaryModule
from kvloom.types import Rope, RopeLayout

TABLE_TOLERANCE = 2e-4
SHORT_POSITIONS = (0, 1, 2, 3)
SAMPLE_POSITIONS = (0, 1, 2, 3, 7, 29, 113)


def explain_tables(modules: Sequence[RotaryModule], limit: int) -> list[Rope]:
    """Return every rotation that the modules' tables may stand for below `limit` positions."""
    ropes: dict[Rope, None] = {}
    for rotary in modules:
        for selector in rotary.calls:
            for first_of_pair, scaling in _frequencies(rotary, selector, limit):
                for rope in _arrangements(first_of_pair, scaling):
                    ropes[rope] = None
    return list(ropes)


def places(ropes: Sequence[Rope], k_dim: int) -> list[Rope]:
    """Return the rotations that fit a head, at its start and at its end."""
    fitting = [rope for rope in ropes if rope.num_dims <= k_dim]
    ends = [replace(rope, first_dim=k_dim - rope.num_dims) for rope in fitting]
    return list(dict.fromkeys([*fitting, *ends]))


def constant_until(modules: Sequence[RotaryModule], limit: int) -> int:
    """Return up to how many positions all tables stay what they are for a short text."""
    return min((_constant_until(rotary, limit) for rotary in modules), default=limit)


def _constant_until(rotary: RotaryModule, limit: int) -> int:
    constant = limit
    for selector in rotary.calls:
        short = table_at(rotary, selector, SHORT_POSITIONS)

        def same(length: int, selector: tuple[Any, ...] = selector, short: Any = short) -> bool:
            # A dynamic table stays grown at its own length: only a shorter text takes it back.
            table_at(rotary, selector, SHORT_POSITIONS)
            probe = table_at(rotary, selector, (*SHORT_POSITIONS, length - 1))
            parts = zip(probe, short, strict=True)
            return all(torch.allclose(p[: len(s)], s, atol=1e-6) for p, s in parts)

        if not same(limit):
            low, high = len(SHORT_POSITIONS), limit
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if same(middle) else (low, middle)
            constant = min(constant, low)
        table_at(rotary, selector, SHORT_POSITIONS)
    return constant


def table_at(
    rotary: RotaryModule, selector: tuple[Any, ...], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the module's own cos and sin, each (positions, r)."""
    pos = torch.tensor([positions])
    arguments: dict[str, Any] = {}
    for name in inspect.signature(rotary.forward).parameters:
        if "position" in name:
            arguments[name] = pos
        elif name == "layer_type" and selector:
            arguments[name] = selector[0]
        elif name == "seq_len":
            arguments[name] = max(positions) + 1
        elif not arguments:
            arguments[name] = torch.zeros(1, len(positions), 1)
    cos, sin = rotary.forward(**arguments)
    return cos.reshape(len(positions), -1).float(), sin.reshape(len(positions), -1).float()


def _frequencies(
    rotary: RotaryModule, selector: tuple[Any, ...], limit: int
) -> list[tuple[tuple[float, ...], float]]:
    """Return the module's buffers that reproduce its table, with the table's scaling."""
    samples = [position for position in SAMPLE_POSITIONS if position < limit]
    cos, sin = table_at(rotary, selector, samples)
    scaling = float(cos[0].max())
    pos = torch.tensor(samples, dtype=torch.float32)
    found = []
    for inv_freq in _buffers(rotary.module):
        angles = pos[:, None] * inv_freq
        for arranged in (
            torch.cat([angles, angles], dim=-1),
            angles.repeat_interleave(2, dim=-1),
            angles,
        ):
            if arranged.shape == cos.shape and _close(arranged, cos, sin, scaling):
                found.append((tuple(inv_freq.tolist()), scaling))
                break
    return found


def _close(angles: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> bool:
    limit = TABLE_TOLERANCE * max(1.0, scaling)
    return bool(
        ((angles.cos() * scaling - cos).abs().max() <= limit)
        and ((angles.sin() * scaling - sin).abs().max() <= limit)
    )


def _buffers(module: nn.Module) -> list[Tensor]:
    named = module.named_buffers(recurse=False)
    return [b.detach().float().flatten() for name, b in named if "inv_freq" in name]


def _arrangements(inv_freq: tuple[float, ...], scaling: float) -> list[Rope]:
    """Return both layouts, turning either way: some models rotate by the negative angle."""
    layouts: tuple[RopeLayout, ...] = ("half", "interleaved")
    backwards = tuple(-frequency for frequency in inv_freq)
    turns = (inv_freq, backwards)
    return [Rope(turn, scaling, layout, 0) for turn in turns for layout in layouts]
