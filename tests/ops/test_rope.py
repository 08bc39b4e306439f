"""Laws of rotation: additive, length-preserving, and equal to moving the query the other way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved_reference
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_reference

from kvloom.ops.rope import rotate, rotation_table, shift_table
from kvloom.types import Rope
from tests.oracles import embedded, turned
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["rotation"]


@st.composite
def ropes(draw: st.DrawFn, *, scaled: bool = False) -> Rope:
    """Ropes of every layout; dyadic frequencies make fp32 angles exact, so no error hides there."""
    exponents = draw(st.lists(st.integers(-12, 0), min_size=1, max_size=4))
    signs = draw(st.lists(st.sampled_from([1, -1]), min_size=4, max_size=4))
    return Rope(
        inv_freq=tuple(sign * 2.0**n for sign, n in zip(signs, exponents, strict=False)),
        scaling=draw(st.sampled_from([1.0, 1.25])) if scaled else 1.0,
        layout=draw(st.sampled_from(["half", "interleaved"])),
        first_dim=draw(st.sampled_from([0, 2, 3])),
    )


def vectors(rope: Rope, rows: int, seed: int, beside: int = 0) -> Tensor:
    """Random (2, rows, d) with `beside` unrotated dimensions behind the rotated ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, rope.first_dim + rope.num_dims + beside, generator=generator)


def near(a: Tensor, b: Tensor | np.ndarray) -> bool:
    return torch.allclose(a.double(), torch.as_tensor(b).double(), rtol=0, atol=NEAR)


seeds = st.integers(0, 2**16)
positions = st.lists(st.integers(0, 5000), min_size=1, max_size=5)
shifts = st.integers(-3000, 3000)
tails = st.integers(0, 3)


@given(rope=ropes(scaled=True), pos=positions, seed=seeds, beside=tails)
def test_rotation_turns_every_pair_by_its_angle(rope, pos, seed, beside):
    x = vectors(rope, len(pos), seed, beside)
    expected = np.stack([embedded(x[:, row].numpy(), p, rope) for row, p in enumerate(pos)], axis=1)
    assert near(rotate(x, *rotation_table(rope, torch.tensor(pos)), rope), expected)


@given(rope=ropes(), pos=positions, shift=shifts, seed=seeds, beside=tails)
def test_rotation_then_shift_is_rotation_by_the_sum(rope, pos, shift, seed, beside):
    x = vectors(rope, len(pos), seed, beside)
    at = torch.tensor(pos)
    moved = rotate(rotate(x, *rotation_table(rope, at), rope), *shift_table(rope, shift), rope)
    assert near(moved, rotate(x, *rotation_table(rope, at + shift), rope))


@given(rope=ropes(), shift=shifts, seed=seeds, beside=tails)
def test_shifts_add_up_and_undo_each_other(rope, shift, seed, beside):
    x = vectors(rope, 3, seed, beside)
    there = rotate(x, *shift_table(rope, shift), rope)
    assert near(rotate(there, *shift_table(rope, -shift), rope), x)
    assert near(
        rotate(there, *shift_table(rope, 7), rope), rotate(x, *shift_table(rope, shift + 7), rope)
    )


@given(rope=ropes(), pos=positions, seed=seeds, beside=tails)
def test_norm_is_preserved_and_unrotated_dims_are_copied(rope, pos, seed, beside):
    x = vectors(rope, len(pos), seed, beside)
    before = x.clone()
    out = rotate(x, *rotation_table(rope, torch.tensor(pos)), rope)
    stop = rope.first_dim + rope.num_dims
    assert near(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[..., : rope.first_dim], x[..., : rope.first_dim])
    assert torch.equal(out[..., stop:], x[..., stop:])
    assert torch.equal(x, before), "the input was written to"


@given(rope=ropes(scaled=True), pos=st.integers(0, 3000), seed=seeds, back=st.integers(0, 500))
def test_scores_depend_on_the_distance_only(rope, pos, seed, back):
    q, k = vectors(rope, 1, seed), vectors(rope, 1, seed + 1)

    def score(q_pos: int, k_pos: int) -> Tensor:
        turned_q = rotate(q, *rotation_table(rope, torch.tensor([q_pos])), rope)
        turned_k = rotate(k, *rotation_table(rope, torch.tensor([k_pos])), rope)
        return (turned_q * turned_k).sum(-1)

    assert near(score(pos + back, pos), score(back, 0))


@given(rope=ropes(scaled=True), pos=positions, shift=shifts, seed=seeds, beside=tails)
def test_moving_the_query_equals_moving_the_key(rope, pos, shift, seed, beside):
    q, k = vectors(rope, len(pos), seed, beside), vectors(rope, len(pos), seed + 1, beside)
    at = torch.tensor(pos)
    q = rotate(q, *rotation_table(rope, at + 3), rope)
    stored = rotate(k, *rotation_table(rope, at), rope)
    there = rotate(k, *rotation_table(rope, at + shift), rope)
    query_moved = rotate(q, *shift_table(rope, -shift), rope)
    assert near((query_moved * stored).sum(-1), (q * there).sum(-1))


@given(shift=st.integers(-100_000, 100_000), seed=seeds)
def test_a_shift_of_awkward_frequencies_is_exact_to_fp32(shift, seed):
    rope = Rope(tuple(float(np.float32(10_000 ** -(i / 4))) for i in range(4)), 1.0, "half", 0)
    x = vectors(rope, 2, seed)
    assert near(rotate(x, *shift_table(rope, shift), rope), turned(x.numpy(), shift, rope))


def test_a_shift_carries_no_scaling():
    rope = Rope((1.0, 0.5), 1.5, "half", 0)
    cos, sin = shift_table(rope, 0)
    assert torch.equal(cos, torch.ones(1, 2))
    assert torch.equal(sin, torch.zeros(1, 2))
    assert rotation_table(rope, torch.tensor([0]))[0].tolist() == [[1.5, 1.5]]


@given(pos=positions, seed=seeds)
def test_half_layout_equals_transformers_llama(pos, seed):
    rope = Rope((1.0, 0.1, 0.01), 1.0, "half", 0)
    x = vectors(rope, len(pos), seed)
    cos, sin = rotation_table(rope, torch.tensor(pos))
    reference, _ = half_reference(
        x[None], x[None], torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    )
    assert near(rotate(x, cos, sin, rope), reference[0])


@given(pos=positions, seed=seeds)
def test_interleaved_layout_equals_transformers_cohere(pos, seed):
    rope = Rope((1.0, 0.1, 0.01), 1.0, "interleaved", 0)
    x = vectors(rope, len(pos), seed)
    cos, sin = rotation_table(rope, torch.tensor(pos))
    reference, _ = interleaved_reference(
        x[None],
        x[None],
        cos.repeat_interleave(2, -1)[None],
        sin.repeat_interleave(2, -1)[None],
    )
    assert near(rotate(x, cos, sin, rope), reference[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(rope=ropes(), pos=positions, seed=seeds, beside=tails)
def test_half_precision_rounds_once_at_the_end(dtype, rope, pos, seed, beside):
    x = vectors(rope, len(pos), seed, beside).to(dtype)
    table = rotation_table(rope, torch.tensor(pos))
    out = rotate(x, *table, rope)
    assert out.dtype == dtype
    assert torch.equal(out, rotate(x.float(), *table, rope).to(dtype))


@given(rope=ropes(), pos=positions, seed=seeds)
def test_strided_inputs_rotate_as_their_copies(rope, pos, seed):
    x = vectors(rope, len(pos), seed).transpose(0, 1).contiguous().transpose(0, 1)
    table = rotation_table(rope, torch.tensor(pos))
    assert torch.equal(rotate(x, *table, rope), rotate(x.contiguous(), *table, rope))
