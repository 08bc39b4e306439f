"""Makes a packed model from a loaded one: probe, record, assemble, pack, prove, measure.

Knows: the order of these steps.
Does not know: where the result is kept.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import torch

from kvloom.model.digest import Progress
from kvloom.model.formats import FormatChoice
from kvloom.model.lean.assemble import assemble_decoder
from kvloom.model.lean.cache import PackedModel
from kvloom.model.lean.explain import UnexplainedError
from kvloom.model.lean.native import NativeExecutor, native_obstacle
from kvloom.model.lean.pack import GgufCodes, Packer
from kvloom.model.lean.prove import (
    RECEIPT_TOKENS,
    check_chain,
    check_layers,
    logits_of,
    receipt,
    receipt_text,
)
from kvloom.model.lean.record import record
from kvloom.model.lean.runner import LeanRunner
from kvloom.model.load import LoadedModel
from kvloom.model.probe import MAX_PROBE_TOKENS, PROBE_TOKENS, probe, probe_tokens
from kvloom.model.seam import SeamRunner
from kvloom.ops.decoder import Decoder
from kvloom.ops.native.library import NativeLibrary
from kvloom.types import WeightFormat


@torch.inference_mode()
def make_packed(
    loaded: LoadedModel,
    choice: FormatChoice,
    library: NativeLibrary,
    progress: Progress | None = None,
) -> PackedModel:
    """Pack a model that was loaded in fp32, and prove it.

    Raises:
        UnsupportedModelError: the probe cannot reproduce the model.
        UnexplainedError: the lean runner does not reproduce the seam; the text says where.
    """
    assert choice.weights is not None
    if progress is not None:
        progress("Probing the model", 0, 0)
    seam = probe(loaded.model, max_positions=loaded.max_positions)
    if seam.spec.positions != "movable":
        raise UnexplainedError(f"its positions are {seam.spec.positions}")
    recording = record(seam, _probe_text(seam))
    codes = next(iter(loaded.path.glob("*.gguf")), None) if choice.keep_codes else None
    packer = Packer(choice.weights, None if codes is None else GgufCodes(codes))
    decoder = assemble_decoder(recording, packer, progress)
    if obstacle := native_obstacle(decoder, torch.float32):
        raise UnexplainedError(f"the compiled executor cannot do {obstacle}")
    executor = NativeExecutor(decoder, library)
    check_layers(executor, decoder, recording)
    runner = LeanRunner(seam.spec, executor)
    if progress is not None:
        progress("Measuring the packed weights", 0, 0)
    formats = set(_formats(decoder))
    found = logits_of(runner, recording.tokens, torch.float32, runner.layout)
    distance = check_chain(found, recording.logits, formats)
    return PackedModel(
        decoder=decoder,
        spec=seam.spec,
        weights=_words(decoder),
        digests={"weights": loaded.digests.weights, "config": loaded.digests.config},
        eos_token_ids=tuple(sorted(loaded.tokenizer.eos_token_ids)),
        tokenizer=loaded.tokenizer.stored(),
        receipt=_receipt(loaded, seam, runner)
        | {"probe_distance": distance, "rounded_matrices": float(sum(packer.rounded.values()))},
    )


def _probe_text(seam: SeamRunner) -> torch.Tensor:
    """Return a text longer than the smallest window, where that can be run at load."""
    windows = [layer.window for layer in seam.spec.layers if layer.window]
    wanted = max(PROBE_TOKENS, min(windows, default=0) + 16)
    limit = min(MAX_PROBE_TOKENS, seam.spec.max_positions)
    return probe_tokens(seam.spec.vocab_size, min(wanted, limit))


def _receipt(loaded: LoadedModel, seam: SeamRunner, runner: LeanRunner) -> dict[str, float]:
    ids = loaded.tokenizer.encode(receipt_text())[: min(RECEIPT_TOKENS, seam.spec.max_positions)]
    tokens = torch.tensor([token for token in ids if token < seam.spec.vocab_size])
    if len(tokens) < 2:
        return {}
    source = logits_of(seam, tokens, torch.float32, "plain")
    found = logits_of(runner, tokens, torch.bfloat16, runner.layout)
    return receipt(found, source, tokens)


def _formats(decoder: Decoder) -> Counter[WeightFormat]:
    weights = chain.from_iterable(layer.weights() for layer in decoder.layers)
    counted = Counter(weight.format for _, weight in weights)
    counted.update([decoder.embedding.format, decoder.head.format])
    return counted


def _words(decoder: Decoder) -> str:
    """Say which formats the matrices have, the most frequent first."""
    return " + ".join(name for name, _ in _formats(decoder).most_common())
