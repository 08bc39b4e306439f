"""What may be asked of an edit is checked before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.engine.fidelity import check_edit
from kvloom.errors import RequestError


@pytest.mark.parametrize("share", [0, 0.15, 1, 1.0])
@pytest.mark.parametrize("fidelity", ["exact", "repaired", "shifted"])
def test_the_selector_of_that_name_is_given(fidelity: Any, share: float) -> None:
    assert check_edit(fidelity, share, "first").rule.name == "first"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        (("perfect", 0.1, "blend"), "fidelity"),
        (("exact", -0.1, "blend"), "share"),
        (("exact", 1.1, "blend"), "share"),
        (("exact", float("nan"), "blend"), "share"),
        (("exact", True, "blend"), "share"),
        (("exact", "half", "blend"), "share"),
        (("exact", 0.5, "worst"), "selector"),
        (("repaired", 0.5, "blend", "unrotated"), "baseline"),
        (("shifted", 0.5, "blend", "odd"), "baseline"),
    ],
)
def test_wrong_settings_are_named(settings: Any, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_edit(*settings)
    assert refused.value.param == param
