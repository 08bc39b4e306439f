"""Fixtures of the benches that do one thing in several ways: a tiny model that is told apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvloom import LLM, StoreSettings
from kvloom.bench import case_run
from kvloom.cost import CostModel
from tests.model.tiny_models import tiny_llama, write_folder

CONTEXT = 1024


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not look for load before a run."""
    monkeypatch.setattr(case_run, "watch_idle", lambda: 0.0)


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose predictions depend on what it reads."""
    model = tiny_llama(max_position_embeddings=CONTEXT, initializer_range=0.4)
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny", model))


@pytest.fixture(scope="package")
def llm(tiny_folder: str) -> Iterator[LLM]:
    """That model, without a store."""
    with tiny_llm(tiny_folder) as made:
        yield made


def tiny_llm(
    folder: str,
    store: StoreSettings | None = None,
    *,
    enable_prefix_caching: bool = False,
    repair_when_idle: bool = False,
) -> LLM:
    """Return a model in fp32; what would make approximations exact is off if not asked for."""
    made = LLM(
        folder,
        dtype="float32",
        enable_prefix_caching=enable_prefix_caching,
        repair_when_idle=repair_when_idle,
        kv_memory="16MiB",
        threads=1,
        store=store,
    )
    # So many layers that a comparison is cheap: a planner repairs what it is asked to.
    made.loop.call(lambda engine: setattr(engine, "costs", everything_pays)).result()
    return made


def everything_pays() -> CostModel:
    """Return the costs of a large model."""
    return CostModel.unmeasured(40)
