"""A tiny model on disk whose greedy text soon meets its own end-of-text token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.tiny_models import tiny_llama, write_folder

PROMPTS = [[5, 6, 7, 8, 9], [40, 41], [99, 100, 101, 102, 103, 104, 105]]
NEW_TOKENS = 6


@pytest.fixture(scope="session")
def expected() -> list[list[int]]:
    """Greedy tokens of each prompt alone, one whole forward pass per token."""
    model = tiny_llama(max_position_embeddings=256)
    outputs = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            with torch.inference_mode():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
        outputs.append(tokens[len(prompt) :])
    return outputs


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]]) -> Path:
    """A folder whose config says that the second token of the first answer ends the text."""
    model = tiny_llama(max_position_embeddings=256)
    model.config.eos_token_id = model.generation_config.eos_token_id = expected[0][1]
    return write_folder(tmp_path_factory.mktemp("tiny") / "model", model)
