"""A family runs lean only where it gives the seam's numbers, and is refused by the layer else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kvloom.model.lean.assemble import assemble_decoder
from kvloom.model.lean.executors import Executor, TorchExecutor
from kvloom.model.lean.explain import UnexplainedError
from kvloom.model.lean.native import NativeExecutor, native_obstacle
from kvloom.model.lean.record import LayerRecord, Recording
from kvloom.model.lean.runner import LeanRunner
from kvloom.model.seam import SeamRunner
from kvloom.ops.decoder import Decoder
from kvloom.ops.native.library import NativeLibrary
from kvloom.types import KVLayout
from tests.model.families import FAMILIES, Family
from tests.model.lean.decoders import (
    REQUIRED,
    Side,
    decoder_of,
    family,
    native_side,
    pack,
    recorded,
    run_all,
    torch_side,
)
from tests.model.running import assert_same, plain_logits, prepared, some_tokens

# What is known to run lean: a family that no longer does shows here.
LEAN = {
    *REQUIRED,
    *("llama_mha", "llama_mqa", "llama_llama3", "llama_yarn", "llama_linear", "llama_dynamic"),
    *("ministral", "qwen2_window", "gemma", "vaultgemma", "phi", "phi3_window", "phi3_longrope"),
    *("granite_swa", "olmo3", "cohere2", "cohere_compass_text", "glm", "glm4", "helium"),
    *("exaone4", "ernie4_5", "seed_oss", "cwm", "internlm3", "iquestcoder", "hyperclovax"),
    "moshi",
}
# Heads of 24 dimensions are no whole vectors of the compiled executor.
TORCH_ONLY = {"llama_mqa", "seed_oss", "internlm3", "iquestcoder"}
SAMPLE = {
    *("llama_mqa", "phi", "cohere2", "olmo3", "olmo", "arcee", "mixtral", "gpt_oss"),
    *("deepseek_v3", "mimo_v2_flash", "gpt2", "diffllama"),
}
RUNNING = [
    pytest.param(entry, id=entry.name, marks=() if entry.name in SAMPLE else (pytest.mark.long,))
    for entry in FAMILIES
    if entry.expect != "refused"
]
TOKENS = some_tokens(58, seed=3)
CHUNKS = (17, 1, 1)


def executors(decoder: Decoder, libraries: list[NativeLibrary]) -> list[Executor]:
    """Return every executor that takes a decoder."""
    found: list[Executor] = [TorchExecutor(decoder), TorchExecutor(decoder, "tiled")]
    if native_obstacle(decoder, torch.float32) is None:
        found += [NativeExecutor(decoder, library) for library in libraries]
    return found


@pytest.mark.parametrize("name", REQUIRED)
def test_required_families_equal_transformers_at_every_level(
    name: str, library: NativeLibrary
) -> None:
    truth = plain_logits(family(name)[0], TOKENS)
    side = native_side(name, library)
    assert_same(run_all(side, TOKENS), truth)
    assert_same(run_all(side, TOKENS, CHUNKS), truth)


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@pytest.mark.parametrize("name", REQUIRED)
def test_required_families_equal_transformers_in_torch(name: str, layout: KVLayout) -> None:
    truth = plain_logits(family(name)[0], TOKENS)
    side = torch_side(name, layout)
    assert_same(run_all(side, TOKENS), truth)
    assert_same(run_all(side, TOKENS, CHUNKS), truth)


@pytest.mark.parametrize("entry", RUNNING)
def test_every_family_is_equal_or_refused(entry: Family, best_library: NativeLibrary) -> None:
    plain, seam = prepared(entry.name)
    if entry.name not in LEAN:  # one that has come to run lean is noted above
        with pytest.raises(UnexplainedError, match=r"\w+ \w+ \w+"):
            assemble_decoder(recorded(seam), pack("float32"))
        return
    decoder = assemble_decoder(recorded(seam), pack("float32"))
    found = executors(decoder, [best_library])
    assert (len(found) == 2) == (entry.name in TORCH_ONLY)
    truth = plain_logits(plain, TOKENS)
    for executor in found:
        side = Side(executor.name, LeanRunner(seam.spec, executor), executor.layout)
        assert_same(run_all(side, TOKENS, CHUNKS), truth)


@pytest.fixture(scope="session")
def best_library(request: pytest.FixtureRequest) -> NativeLibrary:
    from tests.conftest import loadable

    found = loadable(request.config.getoption("--native-libraries"))
    if not found:
        pytest.fail("no compiled library can be loaded; run `make native`")
    return found[0]


def test_matrices_are_packed_by_who_asks() -> None:
    asked: list[tuple[int, ...]] = []

    def noting(weight: torch.Tensor) -> Any:
        asked.append(tuple(weight.shape))
        return pack("int8")(weight)

    seam = prepared("llama")[1]
    decoder = assemble_decoder(recorded(seam), noting)
    assert len(asked) == 4 * 7 + 2
    assert {weight.format for layer in decoder.layers for _, weight in layer.weights()} == {"int8"}


def test_a_tied_head_is_packed_once() -> None:
    tied, untied = decoder_of("gemma2"), decoder_of("llama")
    assert tied.head.codes.data_ptr() == tied.embedding.codes.data_ptr()
    assert untied.head.codes.data_ptr() != untied.embedding.codes.data_ptr()


def test_facts_are_those_of_the_config() -> None:
    granite, gemma, cohere = (decoder_of(name) for name in ("granite", "gemma2", "cohere"))
    assert granite.embedding_scale == pytest.approx(3.0)
    assert granite.logit_scale == pytest.approx(1 / 0.5)
    assert {layer.residual_scale for layer in granite.layers} == {0.7}
    assert {layer.scale for layer in granite.layers} == {0.2}
    assert gemma.embedding_scale == pytest.approx(8.0)
    assert (gemma.logit_softcap, gemma.layers[0].spec.softcap) == (30.0, 5.0)
    assert {layer.activation for layer in gemma.layers} == {"gelu_tanh"}
    assert {layer.output_norm.kind for layer in gemma.layers} == {"rms"}
    assert all(layer.parallel for layer in cohere.layers)
    assert {layer.input_norm.kind for layer in cohere.layers} == {"layer"}
    assert not any(layer.parallel for layer in granite.layers)


def test_progress_counts_layers() -> None:
    calls: list[tuple[str, int, int]] = []
    seam = prepared("llama")[1]
    assemble_decoder(recorded(seam), pack("float32"), lambda *call: calls.append(call))
    assert [(done, total) for _, done, total in calls] == [(n, 4) for n in range(4)]


# Sabotage. What the seam computes is changed in one place, so the assembled decoder cannot be it.


def add_to_output(layer: Any) -> None:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[:, 7, 3] += 1e-2
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layer.register_forward_hook(add)


def scale_one_row_of(name: str, factor: float = 1.02) -> Callable[[Any], None]:
    """Scale what a submodule gives for one late row, as a gate by position would."""

    def change(layer: Any) -> None:
        def scaled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            changed[:, -1] *= factor
            return changed

        layer.get_submodule(name).register_forward_hook(scaled)

    return change


def other_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


class NearlySilu(nn.SiLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(1.01 * x)


def near_activation(layer: Any) -> None:
    layer.mlp.act_fn = NearlySilu()


def clipped_attention(layer: Any) -> None:
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, output: output.clamp(-0.2, 0.2))


def own_scale(layer: Any) -> None:
    inner = layer.self_attn.q_proj.forward
    layer.self_attn.q_proj.forward = lambda x: inner(x) * 1.05


def skipped_branch(layer: Any) -> None:
    layer.self_attn.register_forward_hook(lambda m, a, output: (output[0] * 0, *output[1:]))


def clipped_norm(layer: Any) -> None:
    layer.input_layernorm.register_forward_hook(lambda m, a, output: output.clamp(-1, 1))


SABOTAGES = {
    "a summand in one place": add_to_output,
    "the last row of the MLP": scale_one_row_of("mlp.down_proj"),
    "the last row of the values": scale_one_row_of("self_attn.v_proj"),
    "the last row of the keys": scale_one_row_of("self_attn.k_proj", 1.5),
    "relu": other_activation,
    "a near activation": near_activation,
    "clipped attention": clipped_attention,
    "scaled queries": own_scale,
    "no attention": skipped_branch,
    "clipped norm": clipped_norm,
}


@pytest.mark.parametrize("last", [0, 3])
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_layer_that_computes_something_else_is_named(name: str, last: int) -> None:
    seam = prepared("llama")[1]
    model: Any = seam.model
    SABOTAGES[name](model.model.layers[last])
    with pytest.raises(UnexplainedError, match=rf"^layer {last} differs: "):
        assemble_decoder(recorded(seam), pack("float32"))


def scale_weight(layer: Any, path: str) -> None:
    layer.get_submodule(path).weight.data.mul_(1.01)


@pytest.mark.parametrize(
    "path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("last", [0, 3])
def test_weights_that_changed_since_are_named(path: str, last: int) -> None:
    seam = prepared("llama")[1]
    recording = recorded(seam)
    model: Any = seam.model
    scale_weight(model.model.layers[last], path)
    with pytest.raises(UnexplainedError, match=rf"^layer {last} differs: "):
        assemble_decoder(recording, pack("float32"))


def with_layer(recording: Recording, index: int, layer: LayerRecord) -> Recording:
    layers = (*recording.layers[:index], layer, *recording.layers[index + 1 :])
    return replace(recording, layers=layers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": None},
        {"window": 15},
        {"window": 17},
        {"rope": None},
        {"softcap": 3.0},
    ],
    ids=str,
)
def test_facts_of_a_layer_that_are_wrong_are_found_out(wrong: dict[str, Any]) -> None:
    recording = recorded(prepared("gemma3_text")[1])
    first = recording.layers[0]
    assert first.spec.window == 16
    changed = replace(first, spec=replace(first.spec, **wrong))
    with pytest.raises(UnexplainedError, match=r"^layer 0 differs: no arrangement"):
        assemble_decoder(with_layer(recording, 0, changed), pack("float32"))


def test_another_scale_is_found_out() -> None:
    recording = recorded(prepared("llama")[1])
    changed = replace(recording.layers[1], scale=recording.layers[1].scale * 1.02)
    with pytest.raises(UnexplainedError, match=r"^layer 1 differs: no arrangement"):
        assemble_decoder(with_layer(recording, 1, changed), pack("float32"))


def test_sinks_that_are_left_out_are_found_out() -> None:
    recording = recorded(prepared("llama")[1])
    sinks = torch.zeros(recording.layers[1].spec.heads)
    changed = replace(recording.layers[1], sinks=sinks)
    with pytest.raises(UnexplainedError, match=r"^layer 1 differs: no arrangement"):
        assemble_decoder(with_layer(recording, 1, changed), pack("float32"))


def sabotage_embedding(seam: SeamRunner) -> None:
    model: Any = seam.model
    model.model.embed_tokens.register_forward_hook(lambda m, a, output: output + 1e-2)


def sabotage_norm(seam: SeamRunner) -> None:
    model: Any = seam.model
    model.model.norm.register_forward_hook(lambda m, a, output: output * output.abs())


def sabotage_head(seam: SeamRunner) -> None:
    model: Any = seam.model
    model.lm_head.register_forward_hook(lambda m, a, output: output + output.square() * 1e-2)


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (sabotage_embedding, "no multiple of its embedding"),
        (sabotage_norm, "neither a root mean square nor"),
        (sabotage_head, "its logits are no product"),
    ],
)
def test_ends_that_compute_something_else_are_named(
    sabotage: Callable[[SeamRunner], None], words: str
) -> None:
    seam = prepared("llama")[1]
    sabotage(seam)
    with pytest.raises(UnexplainedError, match=words):
        assemble_decoder(recorded(seam), pack("float32"))
