"""A bench of approximations refuses a model whose settings would make them exact."""

from __future__ import annotations

import pytest

from kvloom import RequestError
from kvloom.bench.lasting import require_lasting

from .conftest import tiny_llm


@pytest.mark.parametrize("setting", ["enable_prefix_caching", "repair_when_idle"])
def test_a_model_with_either_is_refused(tiny_folder: str, setting: str) -> None:
    wanted = {"enable_prefix_caching": False, "repair_when_idle": False, setting: True}
    with (
        tiny_llm(tiny_folder, **wanted) as made,
        pytest.raises(RequestError, match="the bench of edits needs a model without"),
    ):
        require_lasting(made, "edits")
