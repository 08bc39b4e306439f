"""Fixtures of the decode tests.

Knows: where the embedded model's tokenizer lies.
Does not know: the rest of the model.
"""

from pathlib import Path

import pytest

from .texts import LibraryText, byte_fallback_text


@pytest.fixture(scope="session")
def smollm(default_model_path: Path) -> LibraryText:
    """The embedded model's byte-level tokenizer."""
    return LibraryText.from_folder(Path(default_model_path), "<|im_end|>")


@pytest.fixture(scope="session")
def metaspace() -> LibraryText:
    """A byte-fallback tokenizer that decodes with Metaspace."""
    return byte_fallback_text(strip=False)


@pytest.fixture(scope="session")
def sentencepiece() -> LibraryText:
    """A byte-fallback tokenizer that decodes as Llama's does."""
    return byte_fallback_text(strip=True)
