"""Fixtures of the engine tests: front ends over the fake model, and over a tiny real one.

Knows: how to put an engine into an assembly without loading anything.
Does not know: any test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import LLM, AsyncLLM
from kvloom.cost import CostModel
from kvloom.engine import aio, llm
from kvloom.engine.assembly import Assembly
from kvloom.model.open import OpenedModel
from tests.engine.worlds import TOKENIZER, fake_engine
from tests.fake_model import FakeRunner
from tests.model.tiny_models import tiny_llama, write_folder

MakeLLM = Callable[..., LLM]


def fake_assembly(**settings: Any) -> Assembly:
    runner = settings.setdefault("runner", FakeRunner())
    engine = fake_engine(**settings)
    unused: Any = None
    opened = OpenedModel(
        runner=runner,
        tokenizer=TOKENIZER,
        path=Path("nowhere"),
        passport=unused,
        kv_dtype=torch.float32,
        layout="plain",
        runner_name="fake",
        runner_note="",
    )
    return Assembly(engine=engine, opened=opened, config=engine.config)


@pytest.fixture
def make_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLLM]:
    """Make an `LLM` over the fake model; it is closed at the end."""
    made: list[LLM] = []

    def make(**settings: Any) -> LLM:
        monkeypatch.setattr(llm, "assemble", lambda *_: fake_assembly(**settings))
        made.append(LLM())
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def make_async_llm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AsyncLLM]:
    """Make an `AsyncLLM` over the fake model; the test closes it, or the engine's thread ends."""

    def make(**settings: Any) -> AsyncLLM:
        monkeypatch.setattr(aio, "assemble", lambda *_: fake_assembly(**settings))
        return AsyncLLM()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a context of 512 tokens."""
    model = tiny_llama(max_position_embeddings=512)
    return write_folder(tmp_path_factory.mktemp("tiny"), model)


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> Iterator[LLM]:
    """The tiny Llama behind an `LLM`, whose plans do not depend on what a pass takes here."""
    with LLM(str(tiny_folder), kv_memory="4MiB") as made:
        make_rows_dear(made)
        yield made


def make_rows_dear(llm: LLM) -> None:
    """Let planners believe that rows cost and that nothing else does."""

    def replace(engine: Any) -> None:
        engine.costs = lambda: CostModel.unmeasured(40)  # so many layers that a comparison is cheap

    llm.loop.call(replace).result(10)
