"""Reads a model's own masks: which keys a query may see at any distance, without long texts.

Knows: the mask functions that transformers' models hand to their mask builder.
Does not know: attention; a window found here is what the fold will honour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FARTHEST_POSITION = 2**20
FIRST_MARK = -3
"""Masks are filled with numbers from here downwards: no mask of a model holds them alone."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Which keys a layer's queries may see.

    Attributes:
        window: number of positions a query sees, itself included; None sees all.
        valid_until: number of positions for which this is so; beyond it the mask has another form.
    """

    window: int | None
    valid_until: int


class MaskRecorder:
    """Stands in for a mask builder and remembers what each mask means.

    The masks it returns are filled with their own number, so that the attention function can tell
    which of them it was given, whatever slice of it arrives.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._functions: list[MaskFunction] = []
        AttentionMaskInterface.register(name, self._record)

    def remove(self) -> None:
        """Let the model build no masks from now on."""
        AttentionMaskInterface._global_mapping.pop(self._name, None)

    def function_of(self, mask: Tensor) -> MaskFunction | None:
        """Return what a mask means; None if it is not one of ours, or was changed on the way."""
        if mask.numel() == 0 or mask.dtype == torch.bool:
            return None
        mark = mask.flatten()[0]
        number = FIRST_MARK - int(mark)
        if not bool((mask == mark).all()) or not 0 <= number < len(self._functions):
            return None
        return self._functions[number]

    def _record(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: MaskFunction,
        **_: Any,
    ) -> Tensor:
        mark = float(FIRST_MARK - len(self._functions))
        self._functions.append(mask_function)
        return torch.full((batch_size, 1, q_length, kv_length), mark)


def reach_of(function: MaskFunction, limit: int) -> Reach | None:
    """Explain a mask as causal with or without a window; None if it is neither anywhere."""
    limit = min(limit, FARTHEST_POSITION)
    lengths = [2, 17, 48, limit // 3, limit // 2, limit]
    oldest = int(_visible(function, limit - 1).to(torch.uint8).argmax())
    window = limit - oldest if oldest else None
    if window is not None:
        # A chunk looks like a window from its last row; behind the first chunk they differ most.
        lengths += [window, window + 1, window + window // 2]
    if all(_explains(function, min(max(n, 1), limit) - 1, window) for n in lengths):
        return Reach(window, limit)
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _explains(function, middle - 1, None) else (low, middle)
    return Reach(None, low) if low > 1 else None


def _visible(function: MaskFunction, query: int) -> Tensor:
    zero = torch.zeros((), dtype=torch.long)
    return torch.as_tensor(
        function(zero, zero, torch.tensor(query), torch.arange(query + 2))
    ).expand(query + 2)


def _explains(function: MaskFunction, query: int, window: int | None) -> bool:
    keys = torch.arange(query + 2)
    expected = keys <= query
    if window is not None:
        expected &= keys > query - window
    return bool((_visible(function, query) == expected).all())
