"""Packed linears give the numbers of plain ones, and models cannot tell them apart."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from kvloom.kv.doc import KVDoc
from kvloom.model.linears import (
    MOST_ROWS,
    PackedLinear,
    pack_linears,
    packing_available,
    rows_of_kernel,
)
from kvloom.model.probe import probe
from tests.model.families import FAMILIES, build
from tests.model.running import (
    BY_NAME,
    ROOT,
    assert_same,
    plain_logits,
    pool_for,
    rows_of,
    some_tokens,
)
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.skipif(not packing_available(), reason="this torch cannot pack linears")


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_packed_linear_equals_the_plain_one(rows, inputs, outputs, bias, dtype, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(rows, inputs).to(dtype)
    packed = PackedLinear(linear)
    near = TOLERANCE[str(dtype).removeprefix("torch.")]["logits"]
    torch.testing.assert_close(packed(x), linear(x), rtol=near, atol=near)
    assert torch.equal(packed.weight, linear.weight)


def test_a_product_of_many_rows_is_cut() -> None:
    linear = nn.Linear(8, 5).requires_grad_(False)
    x = torch.randn(2, 700, 8)
    near = TOLERANCE["float32"]["logits"]
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=near, atol=near)


def test_few_numbers_of_rows_reach_the_kernels() -> None:
    filled = [rows_of_kernel(count) for count in range(1, MOST_ROWS + 1)]
    assert all(rows >= count for count, rows in enumerate(filled, 1))
    assert filled == sorted(filled)
    assert max(filled) == MOST_ROWS
    assert len(set(filled)) <= 16


def test_every_linear_of_a_model_is_packed_once():
    model = build(BY_NAME["llama"])
    linears = {child for child in model.modules() if type(child) is nn.Linear}
    model.twice = nn.ModuleList([model.lm_head, model.lm_head])
    assert pack_linears(model) == len(linears)
    assert not any(type(child) is nn.Linear for child in model.modules())
    assert model.twice[0] is model.twice[1]


def test_what_may_mean_more_than_a_product_stays():
    class Other(nn.Linear):
        pass

    hooked, patched = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    kept = [Other(4, 4), hooked, patched, nn.Linear(4, 4, dtype=torch.float64)]
    model = nn.ModuleList(kept)
    assert pack_linears(model) == 0
    assert list(model) == kept


def test_a_layer_that_differs_when_packed_stays(monkeypatch, caplog):
    model = nn.ModuleList([nn.Linear(8, 8).requires_grad_(False)])
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x + 1)
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear
    assert "stays plain" in caplog.text


@pytest.mark.parametrize("name", [entry.name for entry in FAMILIES if entry.expect != "refused"])
def test_packed_families_give_plain_logits(name):
    plain = build(BY_NAME[name])
    runner = probe(copy.deepcopy(plain))
    pack_linears(runner.model)
    tokens = some_tokens(29)
    doc = KVDoc(pool_for(runner), ROOT)
    (logits,) = runner.forward([rows_of(doc, tokens)]).logits
    assert_same(logits, plain_logits(plain, tokens))
