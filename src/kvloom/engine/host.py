"""The host of documents: what a document needs of the model it belongs to.

Knows: the parts that `LLM` and `AsyncLLM` have in common.
Does not know: documents.
"""

from __future__ import annotations

from typing import Protocol

from kvloom.engine.loop import EngineLoop
from kvloom.model.tokenizer import TextTokenizer
from kvloom.reuse.retokenize import Retokenizer
from kvloom.types import ModelSpec


class Host(Protocol):
    """What a document needs of the model it belongs to; `LLM` and `AsyncLLM` offer it."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's own tokenizer."""
        ...

    @property
    def retokenizer(self) -> Retokenizer:
        """Turns edits of text into edits of tokens."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What the probe found out about the model."""
        ...

    @property
    def loop(self) -> EngineLoop:
        """The thread that owns the engine."""
        ...
