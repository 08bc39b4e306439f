"""Every recipe pins its engine, names a worker and fills in its converter's places."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kvloom.bench.peers.recipes import RECIPES, TORCH, Recipe


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_is_complete(recipe: Recipe) -> None:
    assert RECIPES[recipe.name] is recipe
    assert importlib.util.find_spec(recipe.module) is not None
    packages = [package for step in recipe.steps for package in step]
    assert f"{recipe.package}=={recipe.version}" in packages
    assert all(package == TORCH or re.fullmatch(r"[\w-]+==[\w.]+", package) for package in packages)
    if TORCH in packages:  # first, and in every call behind it, so that no other build comes along
        assert recipe.steps[0] == (TORCH,)
        assert all(TORCH in step for step in recipe.steps)
    assert 0 < recipe.download_mb < recipe.installed_mb
    assert recipe.install_s > 0
    assert recipe.format
    assert recipe.licence
    places = dict.fromkeys(("bin", "python", "model", "output"), Path("place"))
    filled = [part.format(**places) for part in recipe.convert]
    assert bool(filled) == ("{output}" in " ".join(recipe.convert))


def test_the_peers_are_those_that_speed_is_judged_against() -> None:
    assert set(RECIPES) == {"llama.cpp", "openvino", "onnxruntime", "vllm", "ctranslate2"}
