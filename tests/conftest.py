"""Fixtures, hypothesis profiles and shape checks that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes of the pure tensor functions are checked at run time, in tests only.
install_import_hook("kvloom.ops", "beartype.beartype")

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=300, deadline=None, print_blob=True)
settings.load_profile("dev")


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The folder of the embedded model, converted into the user's cache if it is not there."""
    from kvloom.model.convert import convert_gguf
    from kvloom.model.source import resolve_source

    return convert_gguf(resolve_source("default"))
