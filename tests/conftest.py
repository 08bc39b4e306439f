"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The folder of the embedded model, converted into the user's cache if it is not there."""
    from kvloom.model.convert import convert_gguf
    from kvloom.model.source import resolve_source

    return convert_gguf(resolve_source("default"))
