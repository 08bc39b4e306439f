"""Hooks stand in for attention and rotary modules, and leave nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from kvloom.errors import UnsupportedModelError
from kvloom.model.hooks import AttentionCall, AttentionHook, RotarySwap, split_arguments
from kvloom.model.probe import probe
from tests.model.families import build
from tests.model.running import BY_NAME, plain_logits, prepared, some_tokens


def values_only(call: AttentionCall) -> Tensor:
    """Let every row attend to itself alone."""
    return call.v.repeat_interleave(call.q.shape[0] // call.v.shape[0], dim=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_removed_hook_leaves_the_plain_model_bit_for_bit(implementation: str) -> None:
    model = build(BY_NAME["llama"])
    model.set_attn_implementation(implementation)
    tokens = some_tokens(20)
    before = plain_logits(model, tokens)
    hook = AttentionHook(model)
    hook.handler = values_only
    assert not torch.equal(plain_logits(model, tokens), before)
    hook.remove()
    hook.remove()
    assert model.config._attn_implementation == implementation
    assert hook.name not in AttentionInterface()
    assert torch.equal(plain_logits(model, tokens), before)


def test_handler_gets_what_the_module_says() -> None:
    model = build(BY_NAME["gemma2"])
    calls: list[AttentionCall] = []

    def handler(call: AttentionCall) -> Tensor:
        calls.append(call)
        return values_only(call)

    hook = AttentionHook(model)
    hook.handler = handler
    plain_logits(model, some_tokens(20))
    assert [call.module for call in calls] == [layer.self_attn for layer in model.model.layers]
    for call in calls:
        assert (call.q.shape, call.k.shape, call.v.shape) == ((4, 20, 32), (2, 20, 32), (2, 20, 32))
        assert call.scale == pytest.approx(24**-0.5)
        assert (call.softcap, call.sink, call.mask) == (5.0, None, None)
    assert [call.window for call in calls] == [16, None, 16, None]
    hook.remove()


def test_sinks_arrive() -> None:
    model = build(BY_NAME["gpt_oss"])
    sinks: list[Tensor | None] = []

    def handler(call: AttentionCall) -> Tensor:
        sinks.append(call.sink)
        return values_only(call)

    hook = AttentionHook(model)
    hook.handler = handler
    plain_logits(model, some_tokens(4))
    for sink, layer in zip(sinks, model.model.layers, strict=True):
        assert sink is layer.self_attn.sinks
    hook.remove()


def test_pass_outside_of_a_runner_is_an_error() -> None:
    model = build(BY_NAME["llama"])
    hook = AttentionHook(model)
    with pytest.raises(AssertionError, match="outside of a runner"):
        plain_logits(model, some_tokens(4))
    hook.remove()


def test_hooks_of_two_models_do_not_meet() -> None:
    first, second = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    hooks = [AttentionHook(model) for model in (first, second)]
    assert hooks[0].name != hooks[1].name
    hooks[0].handler = values_only
    hooks[0].remove()
    hooks[1].handler = values_only
    plain_logits(second, some_tokens(4))
    hooks[1].remove()


def test_registry_keeps_no_model_alive() -> None:
    import weakref

    runner = probe(build(BY_NAME["llama"]))
    model = weakref.ref(runner.model)
    del runner
    gc.collect()
    assert model() is None


def test_attention_that_cannot_be_replaced_is_refused() -> None:
    class Stubborn:
        class config:  # noqa: N801
            _attn_implementation = "eager"

        def set_attn_implementation(self, name: str) -> None:
            raise ValueError("only eager attention")

    names = set(AttentionInterface())
    with pytest.raises(UnsupportedModelError, match=r"Stubborn.*only eager attention"):
        AttentionHook(Stubborn())
    assert set(AttentionInterface()) == names


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "granite_swa", "moshi"])
def test_neutral_rotary_modules_turn_nothing_and_come_back(name: str) -> None:
    model, untouched = build(BY_NAME[name]), build(BY_NAME[name])
    tokens = some_tokens(20)
    swap = RotarySwap(model)
    assert swap.modules
    swap.watch()
    assert torch.equal(plain_logits(model, tokens), plain_logits(untouched, tokens))
    tables: list[tuple[Tensor, Tensor]] = []
    for rotary in swap.modules:
        rotary.module.register_forward_hook(lambda _m, _i, table: tables.append(table))
    plain_logits(model, tokens)
    swap.neutralise()
    plain_logits(model, tokens)
    real, neutral = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    assert real
    for (cos, sin), (own_cos, own_sin) in zip(neutral, real, strict=True):
        assert (cos.shape, sin.shape) == (own_cos.shape, own_sin.shape)
        assert cos.dtype == own_cos.dtype
        assert bool((cos == 1).all())
        assert bool((sin == 0).all())
    swap.restore()
    assert torch.equal(plain_logits(model, tokens), plain_logits(untouched, tokens))


def test_odd_tables_are_noticed() -> None:
    model = build(BY_NAME["deepseek_v2"])
    swap = RotarySwap(model)
    swap.watch()
    plain_logits(model, some_tokens(4))
    assert swap.odd_outputs
    swap.restore()


def test_positions_are_told_from_other_arguments() -> None:
    hidden, pos = torch.zeros(1, 3, 4), torch.arange(3)[None]
    assert split_arguments((hidden, pos), {})[0] is pos
    assert split_arguments((hidden,), {"position_ids": pos, "layer_type": "full"})[1] == ("full",)
    assert split_arguments((pos,), {"layer_type": None}) == (pos, ())
    assert split_arguments((hidden, 7), {}) == (hidden, (7,))


def test_probed_model_can_be_given_back() -> None:
    plain, runner = prepared("llama")
    tokens = some_tokens(20)
    runner._hook.remove()
    for module in runner.model.modules():
        module.__dict__.pop("forward", None)
    assert torch.equal(plain_logits(runner.model, tokens), plain_logits(plain, tokens))
