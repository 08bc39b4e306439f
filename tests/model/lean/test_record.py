"""A recording holds the seam's numbers, layer by layer, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kvloom.model.lean.explain import UnexplainedError
from kvloom.model.probe import probe_tokens
from tests.model.lean.decoders import family, recorded
from tests.model.running import assert_same, plain_logits, prepared


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "cohere", "starcoder2"])
def test_layers_follow_each_other_and_end_in_the_logits(name: str) -> None:
    plain, seam, recording = family(name)
    tokens = probe_tokens(seam.spec.vocab_size, 40)
    assert torch.equal(recording.tokens, tokens)
    assert recording.pos.tolist() == list(range(40))
    assert [layer.spec for layer in recording.layers] == list(seam.spec.layers)
    for first, second in zip(recording.layers, recording.layers[1:], strict=False):
        assert torch.equal(first.after, second.before)
        assert not torch.equal(first.before, first.after)
    assert_same(recording.logits, plain_logits(plain, tokens.numpy()))
    with torch.inference_mode():
        truth = plain.model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
    for layer, hidden in zip(recording.layers, truth.hidden_states, strict=False):
        torch.testing.assert_close(layer.before, hidden[0], rtol=1e-4, atol=1e-4)


def test_modules_are_those_of_the_model() -> None:
    _, seam, recording = family("llama")
    model: Any = seam.model
    assert [layer.module for layer in recording.layers] == list(model.model.layers)
    assert [layer.attention for layer in recording.layers] == [
        layer.self_attn for layer in model.model.layers
    ]
    assert recording.end_norms == (model.model.norm,)
    assert torch.equal(recording.embedding, model.model.embed_tokens.weight)
    assert torch.equal(recording.head.weight, model.lm_head.weight)
    assert {layer.scale for layer in recording.layers} == {0.25}


def test_sinks_are_recorded() -> None:
    _, seam = prepared("gpt_oss")
    model: Any = seam.model
    for layer, module in zip(recorded(seam).layers, model.model.layers, strict=True):
        assert layer.sinks is not None
        assert torch.equal(layer.sinks, module.self_attn.sinks)
    assert all(layer.sinks is None for layer in family("llama")[2].layers)


def test_no_hook_stays() -> None:
    seam = prepared("llama")[1]
    before = {name: len(module._forward_hooks) for name, module in seam.model.named_modules()}
    first, second = recorded(seam), recorded(seam)
    after = {name: len(module._forward_hooks) for name, module in seam.model.named_modules()}
    assert before == after
    assert torch.equal(first.logits, second.logits)


def test_no_hook_stays_where_it_fails() -> None:
    seam = prepared("llama")[1]
    model: Any = seam.model
    calls = []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise ValueError("in the second pass")

    model.lm_head.register_forward_pre_hook(fail)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="second pass"):
        recorded(seam)
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("diffllama", torch.float32, "one attention module each"),
        ("longcat_flash", torch.float32, "stand in a layer each"),
        ("llama", torch.bfloat16, "float32 only"),
    ],
)
def test_what_is_no_series_of_layers_is_refused(name: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(UnexplainedError, match=words):
        recorded(prepared(name, dtype)[1])


def test_a_head_that_is_no_plain_matrix_is_refused() -> None:
    class Head(nn.Linear):
        pass

    seam = prepared("llama")[1]
    model: Any = seam.model
    head = Head(64, 128, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(UnexplainedError, match="head or embedding"):
        recorded(seam)
