"""The probe: finds out by experiment what a model's layers are, and whether kvloom may run it.

Knows: forward passes of a model, with and without its rotary modules, and the hypotheses that could
explain the difference.
Does not know: model names; a hypothesis counts only if it reproduces the model's own numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.errors import UnsupportedModelError
from kvloom.kv.segment import visibility_mask
from kvloom.model.hooks import AttentionCall, AttentionHook, RotarySwap
from kvloom.model.masks import FARTHEST_POSITION, MaskFunction, MaskRecorder, reach_of
from kvloom.model.rotary import constant_until, explain_tables, places
from kvloom.model.seam import SeamRunner
from kvloom.model.trial import check_runner, differs, last_position, relative_positions
from kvloom.ops.partial import add_sink, attend_plain
from kvloom.ops.rope import rotate, rotation_table
from kvloom.types import LayerSpec, ModelSpec, Rope

logger = logging.getLogger(__name__)

PROBE_TOKENS = 48
MAX_PROBE_TOKENS = 640


@dataclass(frozen=True, slots=True)
class Seen:
    """One attention call of a plain pass, and what the module said about itself."""

    spec: LayerSpec
    k: Tensor


@torch.inference_mode()
def probe(model: nn.Module, *, max_positions: int | None = None) -> SeamRunner:
    """Find out what a model is and return a runner that was seen to reproduce it.

    Args:
        model: a causal language model in eval mode; its attention and rotary modules are taken
            over.
        max_positions: positions the model is said to support; None reads its configuration.

    Raises:
        UnsupportedModelError: some number could not be reproduced; the text says which.
    """
    experiment = _Experiment(model, max_positions)
    try:
        return experiment.run()
    except BaseException:
        experiment.swap.restore()
        experiment.hook.remove()
        raise


def probe_tokens(vocab_size: int, count: int) -> Tensor:
    """Return fixed token ids of shape (count,) that repeat little and fit the vocabulary."""
    generator = torch.Generator().manual_seed(20)
    return torch.randint(min(3, vocab_size - 1), vocab_size, (count,), generator=generator)


def plain_logits(model: Any, tokens: Tensor) -> Tensor:
    """Return fp32 logits (s, v) of transformers' own pass over one sequence."""
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits.float()


class _Experiment:
    """The model under the probe, and what has been found out so far."""

    def __init__(self, model: Any, max_positions: int | None) -> None:
        config = model.config.get_text_config()
        limit = max_positions or getattr(config, "max_position_embeddings", None) or 0
        self.model = model
        self.name = type(model).__name__
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        # Some configurations say -1 for "any".
        self.limit = int(limit) if limit > 0 else FARTHEST_POSITION
        self.swap = RotarySwap(model)
        self.hook = AttentionHook(model)
        self.seen: list[Seen] = []
        self.use_text(min(PROBE_TOKENS, self.limit))

    def use_text(self, count: int) -> None:
        """Take a text of this many tokens, and transformers' own logits of it as the truth."""
        self.tokens = probe_tokens(self.vocab_size, count)
        self.pos = torch.arange(count)
        self.hook.remove()
        self.truth = plain_logits(self.model, self.tokens)
        self.hook = AttentionHook(self.model)

    def run(self) -> SeamRunner:
        """Watch, explain, and try what was found."""
        logits = self.watch()
        constant = constant_until(self.swap.modules, self.limit)
        longest = max((seen.spec.window or 0 for seen in self.seen), default=0)
        wanted = longest + 16 if PROBE_TOKENS <= longest < MAX_PROBE_TOKENS - 16 else PROBE_TOKENS
        if min(wanted, constant) != len(self.tokens):
            self.use_text(min(wanted, constant))
            logits = self.watch()
        difference = differs(logits, self.truth, self.dtype)
        if difference > 1:
            raise UnsupportedModelError(
                f"{self.name} gives other logits with the attention kvloom would use "
                f"({difference:.3g} times the tolerance): its attention uses something kvloom "
                "does not know. It cannot be run."
            )
        spec = self.describe(constant)
        if longest >= MAX_PROBE_TOKENS - 16:
            note = f"its window of {longest} was read from its masks, not crossed by the probe text"
            spec = replace(spec, notes=(*spec.notes, note))
        return self.first_that_works(spec)

    def watch(self) -> Tensor:
        """Run the plain model through our attention; note every call and return the logits."""
        self.seen = []
        masks = MaskRecorder(self.hook.name)

        def handler(call: AttentionCall) -> Tensor:
            if call.mask is not None:
                call = replace(call, window=self.window_of(masks.function_of(call.mask)))
            self.seen.append(Seen(_layer(call, len(self.seen)), call.k.clone()))
            return self.attend(call, call.q, call.k)

        self.hook.handler = handler
        self.swap.watch()
        try:
            logits = plain_logits(self.model, self.tokens)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.name} fails with an attention function of ours "
                f"({type(error).__name__}: {error}); it cannot be run."
            ) from error
        finally:
            self.swap.restore()
            masks.remove()
        if not self.seen:
            raise UnsupportedModelError(
                f"{self.name} never calls transformers' AttentionInterface, so its attention "
                "cannot be replaced; choose a model whose attention goes through it."
            )
        return logits

    def window_of(self, function: MaskFunction | None) -> int | None:
        """Return the window that a mask stands for.

        Raises:
            UnsupportedModelError: it is neither causal nor a window, at any length up to the limit.
        """
        if function is None:
            raise UnsupportedModelError(
                f"{self.name} adds something of its own to its mask, or chooses the keys a query "
                "sees; kvloom knows causal masks and windows. It cannot be run."
            )
        reach = reach_of(function, self.limit)
        if reach is None or reach.valid_until < min(self.limit, FARTHEST_POSITION):
            far = "" if reach is None else f" behind {reach.valid_until} positions"
            raise UnsupportedModelError(
                f"The mask of {self.name} is neither causal nor a window{far}; kvloom knows no "
                "other. It cannot be run."
            )
        return reach.window

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
        """Attend over the probe text itself, in the obvious way."""
        mask = visibility_mask(self.pos, self.pos, call.window)
        partial = attend_plain(q, k, call.v, scale=call.scale, mask=mask, softcap=call.softcap)
        return partial.o if call.sink is None else add_sink(partial, call.sink)

    def describe(self, constant: int) -> ModelSpec:
        """Explain every layer's keys by a rotation; unexplained, the model keeps its own.

        Args:
            constant: number of positions up to which all rotary tables stay what they are.
        """
        notes: tuple[str, ...] = ()
        if constant < self.limit:
            notes = (f"its rotary table changes with the length; limited to {constant} positions",)
        layers = tuple(seen.spec for seen in self.seen)
        opaque = ModelSpec(layers, self.vocab_size, constant, "opaque", notes)
        if not self.swap.modules:
            return opaque
        if self.swap.odd_outputs:
            note = "its rotary module returns something else than cos and sin"
            return replace(opaque, notes=(*notes, note))
        ropes = self.explain_layers(explain_tables(self.swap.modules, constant))
        unexplained = [index for index, found in enumerate(ropes) if not found]
        if unexplained:
            note = f"the rotation of layer {unexplained[0]} fits no known layout"
            return replace(opaque, notes=(*notes, note))
        layers = tuple(
            replace(layer, rope=rope) for layer, (rope,) in zip(layers, ropes, strict=True)
        )
        return replace(opaque, layers=layers, positions="movable")

    def explain_layers(self, candidates: list[Rope]) -> list[tuple[Rope | None, ...]]:
        """Return per layer the rotation that turns its unrotated keys into the ones seen.

        An explained layer goes on with its true keys, so the next layer sees its true input. The
        entry of an unexplained layer is empty.
        """
        found: list[tuple[Rope | None, ...]] = []

        def handler(call: AttentionCall) -> Tensor:
            seen = self.seen[len(found)]
            call = replace(call, window=seen.spec.window)
            fits = {
                rope: differs(self.rotate(call.k, rope), seen.k, self.dtype)
                for rope in (None, *places(candidates, call.k.shape[-1]))
            }
            # Half precision may let several rotations pass: the nearest is meant.
            best = min(fits, key=lambda rope: fits[rope])
            if fits[best] > 1:
                found.append(())
                return self.attend(call, call.q, seen.k)
            found.append((best,))
            return self.attend(call, self.rotate(call.q, best), self.rotate(call.k, best))

        self.hook.handler = handler
        self.swap.neutralise()
        try:
            plain_logits(self.model, self.tokens)
        except Exception:
            logger.warning("%s fails without its rotary modules", self.name, exc_info=True)
            return [()] * len(self.seen)
        finally:
            self.swap.restore()
        return found

    def check(self, runner: SeamRunner) -> tuple[float, str]:
        """Return the worst difference to the plain logits, and where it was."""
        with self.refusing_errors():
            return check_runner(runner, self.tokens, self.truth, self.dtype)

    def with_limits(self, runner: SeamRunner) -> SeamRunner:
        """Return a runner whose spec also says how far positions reach and if they are relative."""
        with self.refusing_errors():
            spec = replace(runner.spec, max_positions=last_position(runner, self.dtype) + 1)
            runner = SeamRunner(self.model, spec, self.hook)
            if relative_positions(runner, self.tokens, self.dtype):
                return runner
        return SeamRunner(self.model, replace(spec, positions="absolute"), self.hook)

    @contextmanager
    def refusing_errors(self) -> Iterator[None]:
        """Turn what a model raises in a trial into the reason why it is refused."""
        try:
            yield
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self.name} fails in steps that kvloom makes ({type(error).__name__}: {error}): "
                "it needs masks, or keeps state outside of its attention. It cannot be run."
            ) from error

    def rotate(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Rotate rows of the probe text."""
        return x if rope is None else rotate(x, *rotation_table(rope, self.pos), rope)

    def first_that_works(self, spec: ModelSpec) -> SeamRunner:
        """Try the spec, then the same model with its own rotation, against the plain logits."""
        tries = [spec]
        if spec.positions == "movable":
            layers = tuple(replace(layer, rope=None) for layer in spec.layers)
            notes = (*spec.notes, "with kvloom's rotation its logits differ")
            tries.append(replace(spec, layers=layers, positions="opaque", notes=notes))
        difference, where = float("inf"), ""
        for attempt in tries:
            if attempt.positions == "movable":
                self.swap.neutralise()
            runner = SeamRunner(self.model, attempt, self.hook)
            difference, where = self.check(runner)
            if difference <= 1:
                return self.with_limits(runner)
            self.swap.restore()
        raise UnsupportedModelError(
            f"{self.name} gives other logits {where} than in one plain pass ({difference:.3g} "
            "times the tolerance): it keeps state outside of its attention or reads positions in "
            "a way that is not understood. It cannot be run."
        )


def _layer(call: AttentionCall, index: int) -> LayerSpec:
    return LayerSpec(
        index=index,
        heads=call.q.shape[0],
        kv_heads=call.k.shape[0],
        k_dim=call.k.shape[2],
        v_dim=call.v.shape[2],
        rope=None,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sink is not None,
    )
