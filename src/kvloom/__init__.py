"""kvloom: an LLM inference engine whose KV cache is a document.

Names are loaded on first use, so that `kvloom --help` never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvloom.version import __version__

if TYPE_CHECKING:
    from kvloom.config import EngineConfig
    from kvloom.engine.aio import AsyncLLM
    from kvloom.engine.async_document import AsyncDocument
    from kvloom.engine.document import Document
    from kvloom.engine.llm import LLM
    from kvloom.engine.parts import Chunk
    from kvloom.engine.shelving import StoreSettings
    from kvloom.errors import (
        CapacityError,
        KvloomError,
        ModelLoadError,
        RequestError,
        UnsupportedModelError,
    )
    from kvloom.outputs import (
        CompletionOutput,
        DocumentLayout,
        EditReceipt,
        RequestOutput,
        StreamChunk,
        Usage,
    )
    from kvloom.params import SamplingParams
    from kvloom.reuse.edit_series import TextEdit

_HOMES = {
    "LLM": "kvloom.engine.llm",
    "Document": "kvloom.engine.document",
    "AsyncDocument": "kvloom.engine.async_document",
    "AsyncLLM": "kvloom.engine.aio",
    "EngineConfig": "kvloom.config",
    "SamplingParams": "kvloom.params",
    "Chunk": "kvloom.engine.parts",
    "CompletionOutput": "kvloom.outputs",
    "DocumentLayout": "kvloom.outputs",
    "EditReceipt": "kvloom.outputs",
    "StoreSettings": "kvloom.engine.shelving",
    "RequestOutput": "kvloom.outputs",
    "StreamChunk": "kvloom.outputs",
    "TextEdit": "kvloom.reuse.edit_series",
    "Usage": "kvloom.outputs",
    "CapacityError": "kvloom.errors",
    "KvloomError": "kvloom.errors",
    "ModelLoadError": "kvloom.errors",
    "RequestError": "kvloom.errors",
    "UnsupportedModelError": "kvloom.errors",
}

__all__ = [
    "LLM",
    "AsyncDocument",
    "AsyncLLM",
    "CapacityError",
    "Chunk",
    "CompletionOutput",
    "Document",
    "DocumentLayout",
    "EditReceipt",
    "EngineConfig",
    "KvloomError",
    "ModelLoadError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StoreSettings",
    "StreamChunk",
    "TextEdit",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
