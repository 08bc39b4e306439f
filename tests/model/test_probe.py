"""The probe finds out what every family of the catalogue is, or says why it cannot be run."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvloom.errors import UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.model.probe import probe, probe_tokens
from tests.model.families import FAMILIES, WINDOW, Family, build, parameters
from tests.model.families_base import family
from tests.model.families_dense import DYNAMIC, LLAMA3, LONGROPE, YARN
from tests.model.running import (
    BY_NAME,
    ROOT,
    assert_same,
    plain_logits,
    pool_for,
    prepared,
    rows_of,
    some_tokens,
)
from tests.model.tiny_models import tiny_llama

RUNNING = [entry for entry in FAMILIES if entry.expect != "refused"]
REFUSED = [entry for entry in FAMILIES if entry.expect == "refused"]


@pytest.mark.parametrize("entry", parameters(RUNNING))
def test_family_is_what_the_catalogue_says(entry: Family) -> None:
    runner = probe(build(entry))
    assert runner.spec.positions == entry.expect
    ropes = [layer.rope for layer in runner.spec.layers]
    if runner.spec.positions == "movable":
        assert any(ropes), "every movable family of the catalogue rotates somewhere"


@pytest.mark.parametrize("entry", parameters(REFUSED))
def test_refused_family_says_why_and_stays_as_it_was(entry: Family) -> None:
    model = build(entry)
    tokens = some_tokens(24)
    before = plain_logits(model, tokens)
    with pytest.raises(UnsupportedModelError) as refusal:
        probe(model)
    assert entry.says, "the catalogue names no reason"
    assert entry.says in str(refusal.value)
    assert type(model).__name__ in str(refusal.value)
    torch.testing.assert_close(plain_logits(model, tokens), before, rtol=0, atol=0)


def test_catalogue_is_as_large_as_promised() -> None:
    assert len({entry.name for entry in FAMILIES}) == len(FAMILIES)
    model_types = {entry.config().model_type for entry in RUNNING}
    assert len(model_types) >= 90
    assert all(entry.reason for entry in REFUSED)
    assert not any(entry.says for entry in RUNNING)


def rotary_of(model: Any) -> nn.Module:
    module: nn.Module = model.model.rotary_emb
    return module


@pytest.mark.parametrize(
    ("name", "layout", "first_dim", "num_dims"),
    [
        ("llama", "half", 0, 16),
        ("phi", "half", 0, 8),
        ("cohere", "interleaved", 0, 16),
        ("glm", "interleaved", 0, 8),
        ("deepseek_v3", "half", 16, 8),
        ("gpt_oss", "half", 0, 16),
    ],
)
def test_layout_and_frequencies_are_the_models(
    name: str, layout: str, first_dim: int, num_dims: int
) -> None:
    plain, runner = prepared(name)
    rotary = rotary_of(plain)
    for layer in runner.spec.layers:
        assert layer.rope is not None
        assert (layer.rope.layout, layer.rope.first_dim, layer.rope.num_dims) == (
            layout,
            first_dim,
            num_dims,
        )
        frequencies = torch.tensor(layer.rope.inv_freq).abs()
        torch.testing.assert_close(frequencies, rotary.inv_freq.float().flatten())


def test_every_layer_gets_its_own_facts() -> None:
    spec = prepared("gemma2")[1].spec
    assert [layer.window for layer in spec.layers] == [WINDOW, None, WINDOW, None]
    assert {layer.softcap for layer in spec.layers} == {5.0}
    spec = prepared("gpt_oss")[1].spec
    assert all(layer.sinks for layer in spec.layers)
    spec = prepared("smollm3")[1].spec
    assert [layer.rope is None for layer in spec.layers] == [False, True, False, True]
    spec = prepared("mimo_v2_flash")[1].spec
    assert {(layer.k_dim, layer.v_dim) for layer in spec.layers} == {(24, 16)}
    spec = prepared("laguna")[1].spec
    assert [layer.heads for layer in spec.layers] == [4, 8, 4, 8]
    spec = prepared("gemma3_text")[1].spec
    ropes = {layer.window: layer.rope for layer in spec.layers}
    assert ropes[None] != ropes[WINDOW], "two rotary tables, by layer type"


def test_window_wider_than_the_probe_text_is_crossed() -> None:
    entry = family("mistral", sliding_window=60)
    plain, runner = build(entry), probe(build(entry))
    assert {layer.window for layer in runner.spec.layers} == {60}
    assert runner.spec.notes == ()
    assert plain_logits(plain, some_tokens(80)).shape[0] == 80


def test_window_too_wide_to_cross_is_read_and_noted() -> None:
    entry = family("mistral", sliding_window=2048, max_position_embeddings=8192)
    spec = probe(build(entry)).spec
    assert {layer.window for layer in spec.layers} == {2048}
    assert any("2048" in note and "not crossed" in note for note in spec.notes)


def test_chunks_too_wide_to_cross_are_no_window() -> None:
    # From its last row a chunked mask looks like a window; a text of the probe's length is exact.
    entry = family(
        "llama4_text",
        intermediate_size_mlp=96,
        no_rope_layer_interval=2,
        attention_chunk_size=2048,
        floor_scale=4096,
        max_position_embeddings=4096,
    )
    with pytest.raises(UnsupportedModelError, match="behind 2048 positions"):
        probe(build(entry))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LONGROPE, DYNAMIC], ids=lambda r: r["rope_type"])
@pytest.mark.parametrize("positions", [24, 64, 96])
def test_positions_end_where_the_table_changes(rope: dict[str, Any], positions: int) -> None:
    entry = family("llama", rope_parameters=copy.deepcopy(rope), max_position_embeddings=positions)
    model = build(entry)
    plain = build(entry)
    spec = probe(model, max_positions=4 * positions).spec
    switch = {"longrope": 64, "dynamic": positions}.get(rope["rope_type"], 4 * positions)
    assert spec.max_positions == min(switch, 4 * positions)
    assert spec.positions == "movable"
    assert bool(spec.notes) == (switch < 4 * positions)
    rope_found = spec.layers[0].rope
    assert rope_found is not None
    # The table of a text that ends at the switch is the one that was found.
    rows = torch.arange(spec.max_positions)[None]
    cos, _ = rotary_of(plain)(torch.zeros(1), rows)
    angles = torch.arange(spec.max_positions)[:, None] * torch.tensor(rope_found.inv_freq)
    expected = torch.cat([angles, angles], dim=-1).cos() * rope_found.scaling
    torch.testing.assert_close(cos[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", [12, 20, 48])
def test_model_of_few_positions(positions: int) -> None:
    model = tiny_llama(max_position_embeddings=positions)
    assert probe(model).spec.max_positions == positions
    learned = build(family("gpt2", n_positions=positions))
    spec = probe(learned).spec
    assert (spec.max_positions, spec.positions) == (positions, "absolute")


def test_positions_end_where_learned_ones_do() -> None:
    # Whisper's configuration names no max_position_embeddings.
    plain, runner = prepared("whisper")
    assert runner.spec.max_positions == plain.config.max_target_positions


def test_length_is_the_callers_if_given() -> None:
    assert probe(tiny_llama(), max_positions=77).spec.max_positions == 77


def test_learned_positions_are_told_from_none_at_all() -> None:
    nope = build(family("smollm3", no_rope_layers=[0, 0, 0, 0]))
    spec = probe(nope).spec
    assert (spec.positions, {layer.rope for layer in spec.layers}) == ("movable", {None})
    assert prepared("gpt2")[1].spec.positions == "absolute"


class Grudging(nn.Module):
    """A rotary module that turns by other frequencies than it shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inner.get_buffer("inv_freq"))
        self.inner = [inner]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.inner[0](x, position_ids * 1.5)
        return cos, sin


def test_table_that_does_not_follow_its_frequencies_is_left_to_the_model() -> None:
    model, plain = (build(BY_NAME["llama"]) for _ in range(2))
    for one in (model, plain):
        one.model.rotary_emb = Grudging(one.model.rotary_emb)
    runner = probe(model)
    assert runner.spec.positions == "opaque"
    assert {layer.rope for layer in runner.spec.layers} == {None}
    assert any("fits no known layout" in note for note in runner.spec.notes)
    tokens = some_tokens(33)
    doc = KVDoc(pool_for(runner), ROOT)
    found = runner.forward([rows_of(doc, tokens)]).logits[0]
    assert_same(found, plain_logits(plain, tokens))


def test_model_that_counts_positions_itself_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.register_buffer("inv_freq", inner.get_buffer("inv_freq"))
            self.inner = [inner]

        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            counted = torch.arange(x.shape[1])[None]
            return self.inner[0](x, counted)

    model = build(BY_NAME["llama"])
    model.model.rotary_emb = Counting(model.model.rotary_emb)
    with pytest.raises(UnsupportedModelError, match="reads positions in a way"):
        probe(model)


def test_broken_numbers_are_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError):
        probe(model)


def test_probe_tokens_repeat_little_and_fit() -> None:
    tokens = probe_tokens(1000, 48)
    assert len(set(tokens.tolist())) > 40
    assert torch.equal(tokens, probe_tokens(1000, 48))
    for vocabulary in (2, 3, 4):
        assert int(probe_tokens(vocabulary, 48).max()) < vocabulary


def test_reason_is_a_sentence() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        probe(build(next(entry for entry in REFUSED if entry.name == "mamba")))
    assert re.search(r"[.;] ?\w.*\.$", str(refusal.value)), "what, why and what to do"
