"""Norms and MLPs are explained by their numbers alone, and what is neither is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvloom.model.lean.explain import (
    Matrix,
    UnexplainedError,
    config_numbers,
    difference,
    equal,
    explain_mlp,
    explain_norm,
    matrix_of,
)
from kvloom.ops.rows import gate, normalize

seeds = st.integers(0, 2**16)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AnyNorm(nn.Module):
    """A norm of any kind, whose epsilon is an attribute under some name."""

    def __init__(
        self, kind: str, shape: tuple[int, ...], epsilon: float, *, offset: float, bias: bool
    ) -> None:
        super().__init__()
        self.kind, self.tiny, self.offset = kind, epsilon, offset
        self.weight = nn.Parameter(1 - offset + 0.3 * noise(1, *shape))
        self.shift = nn.Parameter(0.3 * noise(2, *shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny)
        x = x * (self.weight + self.offset)
        return x if self.shift is None else x + self.shift


@given(
    kind=st.sampled_from(["rms", "layer"]),
    shape=st.sampled_from([(8,), (64,), (1, 16), (4, 16)]),
    epsilon=st.sampled_from([1e-5, 1e-6, 3e-4, 2e-7]),
    offset=st.sampled_from([0.0, 1.0]),
    bias=st.booleans(),
    seed=seeds,
)
@torch.inference_mode()
def test_norms_are_found(kind, shape, epsilon, offset, bias, seed):
    module = AnyNorm(kind, shape, epsilon, offset=offset, bias=bias)
    norm = explain_norm(module)
    assert (norm.kind, norm.width, norm.epsilon) == (kind, shape[-1], epsilon)
    assert torch.equal(norm.weight, module.weight + offset)
    assert (norm.bias is not None) == bias
    for size in (1.0, 1e-3, 1e3):
        x = size * noise(seed, 3, *shape)
        found = normalize(norm, x.reshape(3, -1)).reshape(x.shape)
        assert equal(found, module(x))


@pytest.mark.parametrize(
    ("module", "kind", "epsilon"),
    [(nn.RMSNorm(32, eps=1e-6), "rms", 1e-6), (nn.LayerNorm(32, eps=1e-5), "layer", 1e-5)],
)
def test_norms_of_torch_are_found(module: nn.Module, kind: str, epsilon: float) -> None:
    norm = explain_norm(module)
    assert (norm.kind, norm.epsilon) == (kind, epsilon)


class Changed(AnyNorm):
    """A norm that does something more."""

    def __init__(self, change: Any) -> None:
        super().__init__("rms", (32,), 1e-6, offset=0.0, bias=False)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y.clamp(-1, 1),
        lambda y, x: y * 1.001,
        lambda y, x: torch.tanh(y),
        lambda y, x: x,
        lambda y, x: y.flip(-1),
        lambda y, x: nn.functional.normalize(x, dim=-1),
        lambda y, x: torch.where(x.abs().amax(-1, keepdim=True) < 1e-2, y * 2, y),
    ],
)
@torch.inference_mode()
def test_what_is_no_norm_is_refused(change: Any) -> None:
    with pytest.raises(UnexplainedError, match="Changed is neither"):
        explain_norm(Changed(change))


@pytest.mark.parametrize("module", [nn.Identity(), nn.ReLU(), nn.Linear(4, 4)])
def test_what_has_no_vectors_of_one_shape_is_refused(module: nn.Module) -> None:
    with pytest.raises(UnexplainedError, match=type(module).__name__):
        explain_norm(module)


def activated(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return nn.functional.silu(x)
    return nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class Gated(nn.Module):
    """An MLP whose gate is the first, the second, or half of one matrix."""

    def __init__(self, form: str, name: str, hidden: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.form, self.name = form, name
        self.first = nn.Linear(hidden, 2 * inner if "fused" in form else inner, bias=bias)
        if form in {"gate first", "up first"}:
            self.second = nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)
        for number, linear in enumerate(self.modules()):
            if isinstance(linear, nn.Linear):
                linear.weight.data = noise(number, *linear.weight.shape) / 4

    def branches(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.form == "ungated":
            return None, self.first(x)
        one, two = (
            self.first(x).chunk(2, -1) if "fused" in self.form else (self.first(x), self.second(x))
        )
        return (one, two) if "gate first" in self.form else (two, one)

    def forward(self, x: Tensor) -> Tensor:
        gated, up = self.branches(x)
        return self.down(
            activated(self.name, up if gated is None else gated) * (1 if gated is None else up)
        )


FORMS = ["gate first", "up first", "fused, gate first", "fused, up first", "ungated"]


@given(
    form=st.sampled_from(FORMS),
    name=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
    sizes=st.sampled_from([(16, 24), (16, 16), (24, 8), (16, 32)]),
    bias=st.booleans(),
    seed=seeds,
)
@torch.inference_mode()
def test_mlps_are_found(form, name, sizes, bias, seed):
    torch.manual_seed(seed)
    module = Gated(form, name, *sizes, bias=bias)
    facts = explain_mlp(module, sizes[0])
    assert torch.equal(facts.down.weight, module.down.weight)
    x = noise(seed, 5, sizes[0])
    gated, up = module.branches(x)
    assert facts.activation == name, "also where both kinds of GELU are within the tolerance"
    assert equal(facts.up(x), up)
    assert (facts.gate is None) == (gated is None)
    if facts.gate is not None:
        assert equal(facts.gate(x), gated)
    mine = None if facts.gate is None else facts.gate(x)
    assert equal(facts.down(gate(facts.activation, mine, facts.up(x))), module(x))


class Tuple(Gated):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


@torch.inference_mode()
def test_mlps_that_return_more_are_found() -> None:
    module = Tuple("gate first", "silu", 16, 24, bias=False)
    assert explain_mlp(module, 16).activation == "silu"


class Otherwise(Gated):
    def __init__(self, change: Any) -> None:
        super().__init__("gate first", "silu", 16, 24, bias=False)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x, super().forward(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x, y: m.down(torch.relu(m.first(x)) * m.second(x)),
        lambda m, x, y: m.down(torch.relu(m.first(x)).square()),
        lambda m, x, y: m.down(nn.functional.silu(m.first(x)) + m.second(x)),
        lambda m, x, y: m.down(nn.functional.silu(m.first(x)) * (m.second(x) + 1)),
        lambda m, x, y: m.down((nn.functional.silu(m.first(x)) * m.second(x)).clamp(-1, 1)),
        lambda m, x, y: y + x,
        lambda m, x, y: y * 1.001,
        lambda m, x, y: y.flip(1),
    ],
)
@torch.inference_mode()
def test_what_is_no_mlp_is_refused(change: Any) -> None:
    with pytest.raises(UnexplainedError, match="Otherwise is no MLP"):
        explain_mlp(Otherwise(change), 16)


@torch.inference_mode()
def test_an_mlp_of_other_matrices_is_refused() -> None:
    for module in (nn.Linear(16, 16), nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])):
        with pytest.raises(UnexplainedError, match="no MLP"):
            explain_mlp(module, 16)


@given(start=st.integers(0, 7), length=st.integers(1, 8), bias=st.booleans(), seed=seeds)
def test_rows_of_a_matrix_give_those_outputs(start, length, bias, seed):
    linear = nn.Linear(5, 16, bias=bias)
    matrix, x = matrix_of(linear), noise(seed, 3, 5)
    assert torch.equal(matrix(x), linear(x))
    assert not matrix.weight.requires_grad
    part = matrix.rows(start, start + length)(x)
    torch.testing.assert_close(part, linear(x)[:, start : start + length])


def test_numbers_that_are_none_differ_by_any_measure() -> None:
    x = torch.ones(3)
    assert difference(torch.tensor([1.0, torch.nan, 1.0]), x) == torch.inf
    assert difference(torch.tensor([1.0, torch.inf, 1.0]), x) == torch.inf
    assert difference(torch.ones(2), x) == torch.inf
    assert difference(x + 1e-2, x) == pytest.approx(1e-2, rel=1e-3)
    assert equal(x, x)
    assert not equal(x + 1e-3, x)
    assert Matrix(torch.eye(3))(x).tolist() == [1, 1, 1]


def test_numbers_of_a_config_are_its_hypotheses() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"a": 4, "b": True, "c": 0.5, "d": "text", "e": 0, "f": 1, "g": None, "h": [3]}

    assert config_numbers(Config()) == [4.0, 0.25, 0.5, 2.0]
