"""What cannot be measured is refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvloom import RequestError
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.edit_results import EditOptions


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"places": PlaceRule(-1)}, "behind is -1"),
        ({"places": PlaceRule(scored=0)}, "scored is 0"),
        ({"places": PlaceRule(20, 24, 20)}, "no room for a change"),
        ({"shares": ()}, "shares are"),
        ({"shares": (0.5, 1.5)}, "shares are"),
        ({"shares": (0.0,)}, "shares are"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        replace(EditOptions(), **options)
