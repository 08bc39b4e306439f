"""The fingerprint: equal where KV is equal, different wherever it may differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.model.passport import (
    Formats,
    ModelDigests,
    Passport,
    digest_config,
    digest_files,
    digest_layers,
    make_passport,
)
from kvloom.types import LayerSpec, Rope

DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
FORMATS = st.builds(
    Formats, *[st.sampled_from(["float32", "bfloat16", "float16", "int4"]) for _ in range(3)]
)
PASSPORTS = st.builds(
    Passport,
    weights=DIGESTS,
    config=DIGESTS,
    tokenizer=DIGESTS,
    rope=DIGESTS,
    formats=FORMATS,
    cache_format_version=st.integers(1, 9),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
LAYER = LayerSpec(
    index=0,
    heads=4,
    kv_heads=2,
    k_dim=8,
    v_dim=8,
    rope=Rope(inv_freq=(1.0, 0.1, 0.01), scaling=1.0, layout="half", first_dim=0),
    window=64,
    softcap=30.0,
)
OTHER_VALUES: dict[str, Any] = {
    "index": 1,
    "heads": 8,
    "kv_heads": 4,
    "k_dim": 16,
    "v_dim": 16,
    "rope": None,
    "window": None,
    "softcap": None,
    "sinks": True,
}
OTHER_ROPE_VALUES: dict[str, Any] = {
    "inv_freq": (1.0, 0.1, math.nextafter(0.01, 1)),
    "scaling": math.nextafter(1.0, 2),
    "layout": "interleaved",
    "first_dim": 2,
}


def paths_of(passport: Passport) -> list[tuple[str, ...]]:
    formats = [("formats", name.name) for name in dataclasses.fields(Formats)]
    others = [(name.name,) for name in dataclasses.fields(Passport) if name.name != "formats"]
    return formats + [path for path in others if path not in {("versions",), ("receipt",)}]


def changed(passport: Passport, path: tuple[str, ...], value: Any) -> Passport:
    if path[0] == "formats":
        formats = dataclasses.replace(passport.formats, **{path[1]: value})
        return dataclasses.replace(passport, formats=formats)
    return dataclasses.replace(passport, **{path[0]: value})


@given(passport=PASSPORTS, data=st.data())
def test_any_changed_field_changes_the_fingerprint(passport: Passport, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths_of(passport)))
    value = 99 if path == ("cache_format_version",) else data.draw(DIGESTS)
    other = changed(passport, path, value)
    assert (other.fingerprint == passport.fingerprint) == (other == passport)


@given(passport=PASSPORTS)
def test_the_fingerprint_is_32_bytes_and_does_not_change_by_itself(passport: Passport) -> None:
    again = dataclasses.replace(passport)
    assert again.fingerprint == passport.fingerprint
    assert len(passport.fingerprint) == 32


@given(passport=PASSPORTS)
def test_library_versions_and_receipts_do_not_change_the_fingerprint(passport: Passport) -> None:
    other = dataclasses.replace(passport, versions={"torch": "another"}, receipt={"nll": 2.0})
    assert other.fingerprint == passport.fingerprint


def test_exchanged_digests_are_noticed() -> None:
    one, two = "1" * 64, "2" * 64
    formats = Formats("float32", "float32", "float32")
    assert (
        Passport(one, two, one, one, formats).fingerprint
        != Passport(two, one, one, one, formats).fingerprint
    )


@given(passport=PASSPORTS)
def test_as_dict_is_json_and_shows_everything(passport: Passport) -> None:
    shown = json.loads(json.dumps(passport.as_dict()))
    assert shown["fingerprint"] == passport.fingerprint.hex()
    assert shown["formats"]["kv"] == passport.formats.kv
    assert {field.name for field in dataclasses.fields(Passport)} <= set(shown)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LayerSpec)])
def test_every_fact_of_a_layer_is_digested(name: str) -> None:
    other = dataclasses.replace(LAYER, **{name: OTHER_VALUES[name]})
    assert digest_layers([other]) != digest_layers([LAYER])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Rope)])
def test_every_bit_of_a_rope_is_digested(name: str) -> None:
    assert LAYER.rope is not None
    rope = dataclasses.replace(LAYER.rope, **{name: OTHER_ROPE_VALUES[name]})
    assert digest_layers([dataclasses.replace(LAYER, rope=rope)]) != digest_layers([LAYER])


def test_number_and_order_of_layers_are_digested() -> None:
    other = dataclasses.replace(LAYER, heads=8)
    digests = {digest_layers(layers) for layers in ([LAYER], [LAYER, other], [other, LAYER])}
    assert len(digests) == 3


def test_config_digest_ignores_who_wrote_it_and_the_order() -> None:
    config = {"hidden_size": 64, "rms_norm_eps": 1e-5}
    written = {"transformers_version": "9", "rms_norm_eps": 1e-5, "hidden_size": 64}
    assert digest_config(config) == digest_config(written)
    assert digest_config(config) != digest_config(config | {"rms_norm_eps": 1e-6})


def test_config_digest_covers_code(tmp_path: Path) -> None:
    code = tmp_path / "modeling.py"
    digests = [digest_config({})]
    for content in ("a = 1", "a = 2"):
        code.write_text(content)
        digests.append(digest_config({}, [code]))
    assert len(set(digests)) == 3


def test_weights_digest_covers_every_file_in_any_order(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())
    both = digest_files(files, {}, tmp_path)
    assert digest_files(files[::-1], {}, tmp_path) == both
    assert digest_files(files[:1], {}, tmp_path) != both
    files[1].write_bytes(b"x.safetensors")
    assert digest_files(files, {}, tmp_path) != both


def test_known_digests_are_used_unread(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    known = {"a.safetensors": hashlib.sha256(b"weights").hexdigest()}
    expected = digest_files([file], {}, tmp_path / "cache")
    os.unlink(file)
    assert digest_files([file], known, tmp_path / "cache") == expected


def test_a_passport_names_the_versions_it_was_made_with() -> None:
    import torch
    import transformers

    digests = ModelDigests("1" * 64, "2" * 64, "3" * 64)
    passport = make_passport(digests, [LAYER], Formats("float32", "float32", "float32"))
    assert passport.versions["torch"] == torch.__version__
    assert passport.versions["transformers"] == transformers.__version__
    assert passport.rope == digest_layers([LAYER])
    assert (passport.weights, passport.config, passport.tokenizer) == dataclasses.astuple(digests)
