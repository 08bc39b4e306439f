"""A chain of edits leaves a document that is held against a fresh one of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvloom import LLM, RequestError
from kvloom.bench import chain as chain_module
from kvloom.bench.chain import ChainOptions, run_chain
from tests.model.tiny_models import tiny_llama, write_folder
from tests.tolerances import TOLERANCE

from .conftest import tiny_llm


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "watch_idle", lambda: 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "tiny"
    return str(write_folder(made, tiny_llama(max_position_embeddings=2048)))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with tiny_llm(folder) as made:
        yield made


@pytest.mark.parametrize("edits", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_keys_and_values_after_many_edits_are_those_of_a_fresh_document(
    llm: LLM, edits: int
) -> None:
    said: list[tuple[int, int]] = []
    options = ChainOptions(edits=edits, context=600)
    report = run_chain(llm, options, lambda _, done, total: said.append((done, total)))
    assert len(report.edit_s) == edits
    assert min(report.edit_s) > 0
    assert said == [*((done, edits) for done in range(edits)), (0, 0)]
    near = TOLERANCE["float32"]["rotation"]
    assert 0 < report.key_deviation < near
    assert report.value_deviation < near
    assert 0 <= report.key_deviation_after_one < near
    assert (report.fresh.layout.spans, report.fresh.layout.views) == (1, 1)
    assert report.edited.layout.spans > 20
    assert report.edited.layout.blocks < 2 * report.fresh.layout.blocks
    for figures in (report.edited, report.fresh):
        assert figures.first_token_s > 0
        assert figures.decode_s > 0
    assert llm.stats().kv_bytes_used == 0


def test_what_cannot_be_measured_is_refused(folder: str) -> None:
    with pytest.raises(RequestError, match="edits must be at least 1"):
        ChainOptions(edits=0)
    with tiny_llm(folder) as made, pytest.raises(RequestError, match="longer context"):
        run_chain(made, ChainOptions(edits=1, context=2))
    for settings in ({"enable_prefix_caching": True}, {"repair_when_idle": True}):
        with (
            tiny_llm(folder, **settings) as made,
            pytest.raises(RequestError, match="without prefix caching and without idle repairs"),
        ):
            run_chain(made, ChainOptions())
