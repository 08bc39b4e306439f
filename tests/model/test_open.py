"""A model opens on the fastest runner that was proved for it, and what does not, says why."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes
from kvloom.model import open as opening
from kvloom.model.open import OpenedModel, OpenOptions, open_model
from kvloom.ops.native.library import LEVELS, LibraryUnavailableError, NativeLibrary
from kvloom.types import Rows
from tests.model.tiny_models import tiny_llama, write_folder, write_gguf
from tests.tolerances import TOLERANCE

TOKENS = np.random.default_rng(0).integers(2, 320, 40)
SIZES: dict[str, Any] = {"head_dim": 16, "hidden_size": 64, "max_position_embeddings": 512}


def saved(path: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    return write_folder(path, tiny_llama(**{**SIZES, **changes}).to(dtype))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "tiny")


def opened(path: Path, **options: Any) -> OpenedModel:
    options.setdefault("cache_dir", path.parent / "cache")
    return open_model(str(path), OpenOptions(**options))


def logits(model: OpenedModel) -> Tensor:
    """Return the logits of some tokens on a pool as the model wants it."""
    layers = model.runner.spec.layers
    size = 4 * block_bytes(layers, model.kv_dtype)
    doc = KVDoc(Pool(layers, size, model.kv_dtype, layout=model.layout), Lineage.root(b"open"))
    rows = Rows(doc, TOKENS, np.arange(len(TOKENS)), "all")
    (found,) = model.runner.forward([rows]).logits
    assert found is not None
    return found


def share(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.inference_mode()
def truth(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Tensor:
    """Return transformers' logits in fp32 from weights of a dtype."""
    model = tiny_llama(**{**SIZES, **changes}).to(dtype).float()
    found: Tensor = model(torch.from_numpy(TOKENS)[None]).logits[0]
    return found


def test_float32_runs_on_the_seam(folder: Path, tmp_path: Path) -> None:
    for path, stored in (
        (folder, torch.bfloat16),
        (saved(tmp_path / "full", torch.float32), torch.float32),
    ):
        model = opened(path, dtype="float32")
        assert (model.runner_name, model.layout, model.kv_dtype) == ("seam", "plain", torch.float32)
        assert "reference" in model.runner_note
        assert model.passport.formats.weights == "float32"
        found = logits(model)
        assert share(found, truth(stored)) <= TOLERANCE["float32"]["logits"]
    assert not (tmp_path / "cache" / "packed").exists()


def test_stored_bfloat16_runs_lean(folder: Path) -> None:
    model = opened(folder)
    assert model.runner_name.startswith("lean, native (")
    assert (model.layout, model.kv_dtype, model.runner_note) == ("tiled", torch.bfloat16, "")
    assert model.path == folder
    formats = model.passport.formats
    assert (formats.weights, formats.kv) == ("bfloat16", "bfloat16")
    assert share(logits(model), truth()) <= TOLERANCE["bfloat16"]["logits"]


def test_stored_float32_runs_on_the_seam(tmp_path: Path) -> None:
    model = opened(saved(tmp_path / "full", torch.float32))
    assert model.runner_name == "seam"


def test_quantised_models_run_lean(folder: Path) -> None:
    model = opened(folder, quantization="int8")
    assert model.runner_name.startswith("lean")
    assert model.passport.formats.weights == "int8"
    receipt = model.passport.receipt
    assert receipt["rounded_matrices"] > 0
    assert receipt["tokens"] > 100
    assert 0 <= receipt["kl"] < 0.1
    assert receipt["nll"] == pytest.approx(receipt["source_nll"], rel=0.05)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_kv_in_int8_runs_on_either_runner(tmp_path: Path, stored: torch.dtype) -> None:
    path = saved(tmp_path / "tiny", stored)
    model, usual = opened(path, kv_dtype="int8"), opened(path)
    assert model.runner_name == usual.runner_name
    assert model.runner_name.startswith("lean" if stored is torch.bfloat16 else "seam")
    assert (model.kv_dtype, model.passport.formats.kv) == (torch.int8, "int8")
    assert model.passport.formats.weights == usual.passport.formats.weights
    assert model.passport.fingerprint != usual.passport.fingerprint
    assert share(logits(model), truth(stored)) <= TOLERANCE["int8 KV"]["logits"]


def test_matrices_that_cannot_be_coded_run_lean_and_are_not_rounded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    for stored in (torch.bfloat16, torch.float32):
        path = saved(tmp_path / str(stored), stored, **sizes, intermediate_size=72)
        model = opened(path, quantization="int8")
        assert model.runner_name.startswith("lean"), model.runner_note
        assert model.passport.formats.weights == str(stored).removeprefix("torch.")
        assert model.passport.receipt["rounded_matrices"] == 0


def test_a_format_that_costs_too_much_is_not_run_and_said(folder: Path) -> None:
    # Weights without any structure lose a tenth of their length at four bits.
    model = opened(folder, quantization="int4")
    assert model.runner_name == "seam"
    assert "its logits lie" in model.runner_note


def test_a_gguf_file_runs_with_its_own_codes(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tiny_llama(**SIZES),
        quantised=gguf.GGMLQuantizationType.Q8_0,
    )
    model, reference = opened(path), opened(path, dtype="float32")
    assert model.runner_name.startswith("lean")
    assert reference.runner_name == "seam"
    # The embedding alone has no codes in the file.
    assert model.passport.receipt["rounded_matrices"] <= 1
    assert share(logits(model), logits(reference)) <= TOLERANCE["int8"]["twin logits"]
    assert model.passport.fingerprint != reference.passport.fingerprint


WARM = """
import io, json, sys
from pathlib import Path
read = 0
class Counted(io.FileIO):
    def read(self, size=-1):
        global read
        content = super().read(size)
        read += len(content) * (self.name == str(weights))
        return content
weights = Path(sys.argv[1]) / "model.safetensors"
Path.open = lambda path, mode="r", *rest, plain=Path.open, **named: (
    Counted(str(path)) if path == weights else plain(path, mode, *rest, **named)
)
from kvloom.model.open import OpenOptions, open_model
model = open_model(sys.argv[1], OpenOptions(cache_dir=Path(sys.argv[2])))
modules = [name for name in sys.modules if name.startswith("transformers.model")]
maps = Path("/proc/self/maps").read_text().split()
print(json.dumps({
    "runner": model.runner_name,
    "modules": modules,
    "fingerprint": model.passport.fingerprint.hex(),
    "mapped": sorted({Path(part).name for part in maps if part.endswith(".safetensors")}),
    "read_bytes": read,
}))
"""


def test_a_warm_start_needs_neither_modelling_code_nor_weights(folder: Path) -> None:
    cold = opened(folder)
    cache = folder.parent / "cache"
    command = [sys.executable, "-c", WARM, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["runner"].startswith("lean, ")
    assert found["modules"] == []
    assert found["fingerprint"] == cold.passport.fingerprint.hex()
    assert found["mapped"] == [], "a file of weights is held on to behind its copy"
    assert found["read_bytes"] == 0, "the weights were digested again"


def packed_folder(folder: Path) -> Path:
    (found,) = (path for path in (folder.parent / "cache" / "packed").iterdir() if path.is_dir())
    return found


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest"])
def test_damaged_packed_weights_are_rebuilt_and_it_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = opened(folder)
    expected, place = logits(first), packed_folder(folder)
    path = place / ("packed.json" if damage == "manifest" else "packed.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-200] ^= 4
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        second = opened(folder)
    assert "packing again" in caplog.text
    assert second.runner_name == first.runner_name
    assert torch.equal(logits(second), expected)
    caplog.clear()
    assert torch.equal(logits(opened(folder)), expected)
    assert caplog.text == ""


def test_changed_weights_are_packed_anew(folder: Path) -> None:
    first = opened(folder)
    saved(folder, seed=1)
    second = opened(folder)
    assert second.passport.fingerprint != first.passport.fingerprint
    assert share(logits(second), truth(seed=1)) <= TOLERANCE["bfloat16"]["logits"]


def no_library(*args: Any, **kwargs: Any) -> NativeLibrary:
    raise LibraryUnavailableError("no compiled library is here.", param="cpu_level")


def test_without_a_library_the_seam_runs_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "load_library", no_library)
    with caplog.at_level(logging.WARNING):
        model = opened(folder)
    assert model.runner_name == "seam"
    assert "no compiled library is here" in model.runner_note
    assert "no compiled library is here" in caplog.text
    assert share(logits(model), truth()) <= TOLERANCE["bfloat16"]["logits"]


def test_a_level_that_is_not_to_be_had_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_library", no_library)
    with pytest.raises(RequestError, match="no compiled library") as caught:
        opened(folder, cpu_level="avx2")
    assert caught.value.param == "cpu_level"


def test_contradictions_are_errors(folder: Path) -> None:
    with pytest.raises(RequestError, match="contradict"):
        opened(folder, dtype="float32", quantization="int8")


def test_a_model_that_is_not_reproduced_runs_on_the_seam_and_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "relu", hidden_act="relu")
    with caplog.at_level(logging.WARNING):
        model = opened(folder)
    assert model.runner_name == "seam"
    assert "layer 0 differs" in model.runner_note
    assert "layer 0 differs" in caplog.text
    assert share(logits(model), truth(hidden_act="relu")) <= TOLERANCE["bfloat16"]["logits"]


def test_a_model_that_was_refused_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "relu", hidden_act="relu")
    first = opened(folder)

    def tried(*args: Any) -> None:
        raise AssertionError("tried again")

    with monkeypatch.context() as patched:
        patched.setattr("kvloom.model.lean.make.make_packed", tried)
        caplog.clear()
        second = opened(folder)
        assert second.runner_note == first.runner_note
        assert "layer 0 differs" in caplog.text, "a slower runner is said at every start"
        assert second.passport.fingerprint == first.passport.fingerprint
        with pytest.raises(AssertionError, match="tried again"):
            opened(folder, quantization="int8")
    saved(folder)
    assert opened(folder).runner_name.startswith("lean"), "other weights were tried"


def cannot_write(*args: Any) -> None:
    raise OSError("read-only file system")


def test_a_verdict_that_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "save_refusal", cannot_write)
    model = opened(saved(tmp_path / "relu", hidden_act="relu"))
    assert "layer 0 differs" in model.runner_note
    assert "every start tries the model anew" in caplog.text


def test_heads_that_the_library_cannot_do_run_on_the_seam(tmp_path: Path) -> None:
    model = opened(saved(tmp_path / "narrow", head_dim=8, hidden_size=32))
    assert model.runner_name == "seam"
    assert "heads of 8" in model.runner_note


def test_a_cache_that_cannot_be_written_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "save_packed", cannot_write)
    model = opened(folder)
    assert model.runner_name.startswith("lean")
    assert "every start packs anew" in caplog.text
    assert share(logits(model), truth()) <= TOLERANCE["bfloat16"]["logits"]


def test_fingerprints_follow_formats_and_levels(folder: Path, library: NativeLibrary) -> None:
    def fingerprint(**options: Any) -> bytes:
        return opened(folder, **options).passport.fingerprint

    first = fingerprint(cpu_level=library.level)
    assert fingerprint(cpu_level=library.level) == first
    others = [
        fingerprint(cpu_level=library.level, kv_dtype="float32"),
        fingerprint(cpu_level=library.level, kv_dtype="int8"),
        fingerprint(cpu_level=library.level, quantization="int8"),
        fingerprint(dtype="float32"),
    ]
    assert len({first, *others}) == 5
    for level in LEVELS[LEVELS.index(library.level) + 1 :][:1]:
        assert fingerprint(cpu_level=level) != first


def test_what_is_beside_the_runner_is_the_models_own(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    lean, seam = opened(folder), opened(folder, dtype="float32")
    for warm in (lean, opened(folder)):
        assert warm.tokenizer.eos_token_ids == seam.tokenizer.eos_token_ids == {0, 5, 6}
        assert warm.tokenizer.encode("Hello, you") == seam.tokenizer.encode("Hello, you")
        assert warm.runner.spec == seam.runner.spec
        chat = [{"role": "user", "content": "Hello"}]
        assert warm.tokenizer.chat_tokens(chat) == seam.tokenizer.chat_tokens(chat)
