"""Explains modules by experiment: which norm, which gate, which factor reproduces their numbers.

Knows: hypotheses about small modules, and that equality decides among them.
Does not know: model names; names of children and config values are hypotheses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvloom.ops.decoder import Activation, Norm, NormKind
from kvloom.ops.rows import gate, normalize

T = TypeVar("T")

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value, that counts as rounding in fp32."""
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")


class UnexplainedError(Exception):
    """A module does something that no hypothesis reproduces; the text says which."""


@dataclass(frozen=True, slots=True)
class MlpFacts:
    """What an MLP computes: down(activation(gate x) * up x).

    Attributes:
        gate: matrix of the gate; None where the activation is not gated.
        up: matrix of the other branch.
        down: matrix back to the residual.
        activation: of the gate, or of `up`.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: Activation


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of the model, or some of its rows.

    Attributes:
        weight: fp32 (outputs, inputs).
        bias: (outputs,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x · weightᵀ + bias."""
        return nn.functional.linear(x, self.weight, self.bias)

    def rows(self, start: int, stop: int) -> Matrix:
        """Return some of the outputs."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Matrix(self.weight[start:stop], bias)


def matrix_of(linear: nn.Linear) -> Matrix:
    """Return the matrix of a linear layer."""
    bias = None if linear.bias is None else linear.bias.detach()
    return Matrix(linear.weight.detach(), bias)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest expected value."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = max(float(expected.abs().max()), 1e-6)
    return float((found - expected).abs().max()) / scale


def equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    return difference(found, expected) <= TOLERANCE


def explain_norm(module: nn.Module) -> Norm:
    """Return the norm that a module computes.

    Raises:
        UnexplainedError: it is none of the known.
    """
    values = [p.detach().float() for p in module.parameters(recurse=False)]
    shape = values[0].shape if values else None
    if shape is None or len(values) > 2 or len(shape) > 2 or any(v.shape != shape for v in values):
        raise UnexplainedError(f"{type(module).__name__} is no norm with one or two vectors")
    weight, bias = values[0], values[1] if len(values) == 2 else None
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(2, 5, *shape, generator=generator)
    # Small values, among which epsilon shows.
    trials = torch.cat([wide, wide * 1e-3])
    expected = module(trials).float()
    kinds: tuple[NormKind, ...] = ("rms", "layer")
    norms = [
        Norm(kind, shape[-1], epsilon, weight + offset, bias)
        for kind, offset, epsilon in product(kinds, (0.0, 1.0), _small_numbers(module))
    ]
    found = _nearest(norms, lambda norm: _norm_stretches(norm, trials), expected)
    if found is None:
        raise UnexplainedError(
            f"{type(module).__name__} is neither a root mean square nor a layer norm"
        )
    return found


def explain_mlp(module: nn.Module, hidden: int) -> MlpFacts:
    """Return what an MLP computes.

    Raises:
        UnexplainedError: it is no product of a gate and a second branch, nor a plain activation.
    """
    matrices = [matrix_of(child) for child in module.modules() if type(child) is nn.Linear]
    x = torch.randn(6, hidden, generator=torch.Generator().manual_seed(4))
    expected = module(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected

    def computed(facts: MlpFacts) -> Tensor:
        gated = None if facts.gate is None else facts.gate(x)
        return facts.down(gate(facts.activation, gated, facts.up(x)))

    found = _nearest(_mlps(matrices, hidden), computed, expected[0])
    if found is None:
        raise UnexplainedError(f"{type(module).__name__} is no MLP of a known form")
    return found


def config_numbers(config: Any) -> list[float]:
    """Return the numbers that a config states, as hypotheses for factors and bounds."""
    found: dict[float, None] = {}
    for value in config.to_dict().values():
        if isinstance(value, int | float) and not isinstance(value, bool) and value not in {0, 1}:
            found[float(value)] = None
            found[1 / float(value)] = None
    return list(found)


def _nearest(
    hypotheses: Iterable[T], computed: Callable[[T], Tensor], expected: Tensor
) -> T | None:
    """Return what comes nearest to the expected values, or None if that is not by rounding.

    The first that is near is not enough: the two kinds of GELU may differ by less than the
    tolerance on some values, and by more on a text.
    """
    off = [(difference(computed(each), expected), each) for each in hypotheses]
    least, found = min(off, key=lambda pair: pair[0], default=(float("inf"), None))
    return found if least <= TOLERANCE else None


def _small_numbers(module: nn.Module) -> Iterable[float]:
    found = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1]
    return dict.fromkeys([*found, 1e-5, 1e-6, 1e-8])


def _norm_stretches(norm: Norm, x: Tensor) -> Tensor:
    flat = normalize(norm, x.reshape(*x.shape[:2], -1))
    return flat.reshape(x.shape)


def _mlps(matrices: list[Matrix], hidden: int) -> Iterator[MlpFacts]:
    """Yield every way in which two or three matrices may form an MLP."""
    for down in matrices:
        inner = down.weight.shape[1]
        others = [matrix for matrix in matrices if matrix is not down]
        outputs = [tuple(matrix.weight.shape) for matrix in others]
        if down.weight.shape[0] != hidden:
            continue
        for activation in ACTIVATIONS:
            if outputs == [(inner, hidden)] * 2:
                for first, second in permutations(others):
                    yield MlpFacts(first, second, down, activation)
            elif outputs == [(inner, hidden)]:
                yield MlpFacts(None, others[0], down, activation)
            elif outputs == [(2 * inner, hidden)]:
                halves = others[0].rows(0, inner), others[0].rows(inner, 2 * inner)
                for first, second in permutations(halves):
                    yield MlpFacts(first, second, down, activation)
