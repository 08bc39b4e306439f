"""Where kvloom enters a transformers model: its attention function and its rotary modules.

Knows: transformers' AttentionInterface and the shape of its rotary modules.
Does not know: what the attention computes, or which rotation a layer needs.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvloom.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a transformers attention module hands over; the batch axis is gone.

    Attributes:
        module: the attention module.
        q: queries (h, s, d).
        k: new keys (g, s, d).
        v: new values (g, s, dv).
        scale: factor on q·k.
        window: the window the module asks for, if any.
        softcap: the bound the module asks for, if any.
        sink: sink logit per head (h,), if any.
        mask: what the model's mask builder made, if it made one.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sink: Tensor | None
    mask: Tensor | None


AttentionHandler = Callable[[AttentionCall], Tensor]


class AttentionHook:
    """Sends a model's attention to a handler; one name in transformers' registry per hook.

    Step state lives with the handler: some families drop unknown keyword arguments, so nothing
    can travel through the model's own call chain.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.name = f"kvloom_{id(self):x}"
        self._before = self._model.config._attn_implementation
        self.handler: AttentionHandler | None = None
        registered = weakref.WeakMethod(self._attend)

        def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            method = registered()
            assert method is not None, "the hook of this model is gone"
            return method(*args, **kwargs)

        AttentionInterface.register(self.name, attend)
        try:
            self._model.set_attn_implementation(self.name)
        except (ValueError, KeyError) as error:
            AttentionInterface._global_mapping.pop(self.name, None)
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention be replaced ({error}); "
                "kvloom needs a model that uses transformers' AttentionInterface."
            ) from error

    def remove(self) -> None:
        """Give the model its own attention back."""
        if self.name in AttentionInterface._global_mapping:
            self._model.set_attn_implementation(self._before)
            del AttentionInterface._global_mapping[self.name]

    def _attend(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert self.handler is not None, "a forward pass outside of a runner"
        call = AttentionCall(
            module=module,
            q=query[0],
            k=key[0],
            v=value[0],
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            window=sliding_window,
            softcap=softcap,
            sink=s_aux,
            mask=attention_mask,
        )
        return self.handler(call).transpose(0, 1)[None].contiguous(), None


@dataclass(slots=True)
class RotaryModule:
    """A rotary module of the model, with the calls the model makes to it.

    Attributes:
        name: where it hangs in the model.
        module: the module.
        forward: its own forward method.
        calls: extra arguments (layer types) it was called with, and the table each call gave.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    calls: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)


class RotarySwap:
    """Finds a model's rotary modules, watches what they return, and can take their place."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [
            RotaryModule(name, module, module.forward)
            for name, module in model.named_modules()
            if any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False))
        ]
        self.odd_outputs = False

    def watch(self) -> None:
        """Let the modules work, and note their tables."""
        for rotary in self.modules:
            rotary.module.forward = _watching(self, rotary)

    def neutralise(self) -> None:
        """Let the modules return cos = 1 and sin = 0 in the shape of their tables."""
        for rotary in self.modules:
            rotary.module.forward = _neutral(rotary)

    def restore(self) -> None:
        """Give the modules their own forward methods back."""
        for rotary in self.modules:
            rotary.module.__dict__.pop("forward", None)


def split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return a rotary call's position ids, and whatever else chooses its table."""
    values = [*args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    positions = next((t for t in tensors if not t.is_floating_point()), tensors[-1])
    return positions, tuple(v for v in values if isinstance(v, str | int) and v is not None)


def _watching(swap: RotarySwap, rotary: RotaryModule) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        table = rotary.forward(*args, **kwargs)
        _, selector = split_arguments(args, kwargs)
        if isinstance(table, tuple) and len(table) == 2 and torch.is_floating_point(table[0]):
            rotary.calls[selector] = (table[0], table[1])
        else:
            swap.odd_outputs = True
        return table

    return forward


def _neutral(rotary: RotaryModule) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions, selector = split_arguments(args, kwargs)
        seen = rotary.calls[selector][0]
        shape = (*seen.shape[:-2], positions.shape[-1], seen.shape[-1])
        one = torch.ones((), dtype=seen.dtype, device=positions.device)
        return one.expand(shape), (one - one).expand(shape)

    return forward
