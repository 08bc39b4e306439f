"""Tables and JSON hold every kind with what was repaired and loaded, and the warnings."""

from __future__ import annotations

import json

from kvloom.bench.reuse_show import JOINS, reuse_warnings

from .case_fakes import joined, outcome, reuse_report
from .fakes import printed

KINDS = ("exact", "none")
PAIR = (
    outcome("exact", rows=100),
    outcome("none", rows=40, repaired=15, loaded_bytes=3 * 2**20, divergence=0.25),
)


def test_every_kind_is_a_line_with_its_figures() -> None:
    text = printed(JOINS.render(reuse_report(joined("a", *PAIR), kinds=KINDS)), width=180)
    for part in ("prompts: 1, of 100 to 100 tokens", "15% (15%–15%)", "3.0", "0.2500 ± 0.0000"):
        assert part in text
    for part in ("8 chunks of about 512 tokens", "seed 0", "24 tokens scored", "dtype float32"):
        assert part in text


def test_prompts_without_an_answer_are_warned_of() -> None:
    report = reuse_report(joined("a", *PAIR), joined("b", *PAIR, answered=0), kinds=KINDS)
    assert "1 prompts have no real answer" in reuse_warnings(report)[0]
    assert reuse_warnings(reuse_report(joined("a", *PAIR))) == []
    content = json.loads(JOINS.json(report))
    assert content["schema"] == "kvloom.bench.reuse"
    assert content["figures"][1]["loaded_bytes"]["median"] == 3 * 2**20
    assert any("no real answer" in warning for warning in content["warnings"])
