"""A picture shows every kind that makes an error, and where the exact one stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.bench.case_picture import Wording, draw

from .case_fakes import report, three

pytest.importorskip("matplotlib")
WORDING = Wording("whole", "some tokens", ("repaired", "shifted"))


def test_kinds_groups_and_axes_are_drawn(tmp_path: Path) -> None:
    import matplotlib

    picture = tmp_path / "edits.svg"
    made = report(three("a", 0.02), three("b", 0.03), three("c", 0.1, group="names"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters instead of their outlines
        draw(made, WORDING, picture)
    text = picture.read_text()
    for part in (
        "edits: 2",
        "names: 1",
        "shifted",
        "repaired 15%",
        "first token, ms",
        "Abacus",
        "of the whole",
        "over some tokens",
    ):
        assert part in text
    assert text.count(">shifted<") == 2, "one legend per group"


@pytest.mark.parametrize("divergences", [[], [0.0]])
def test_a_report_without_errors_is_a_picture_too(tmp_path: Path, divergences: list[float]) -> None:
    picture = tmp_path / "edits.png"
    draw(report(*(three(str(n), value) for n, value in enumerate(divergences))), WORDING, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
