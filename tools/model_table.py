"""Writes docs/models.md: which tiny models kvloom runs, and why it refuses the others.

Knows: the catalogue in tests/model, the probe, and the words for what it finds.
Does not know: why a family is as it is; the catalogue holds the reasons.

Run `python tools/model_table.py` after a change of the catalogue or of the probe; it takes a
minute or two. With `--check` nothing is written, and a stale page is an error.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
OUTCOMES = {
    "movable": (
        "Runs, positions movable",
        "kvloom rotates the keys of these models itself, or they have none to rotate. A span can "
        "be shown at another position without touching its keys "
        "([positions](concepts/positions.md)). Rotations: `half` pairs dimension i with i + n, "
        "`interleaved` pairs 2i with 2i + 1; some turn a part of each head only.",
    ),
    "opaque": (
        "Runs, positions opaque",
        "These models keep their own rotation, because no table that the probe knows reproduces "
        "it. Every exact feature works; a span stays at the positions it was computed at.",
    ),
    "absolute": (
        "Runs, positions absolute",
        "The numbers of these models depend on where a text starts, for example because learned "
        "positions are added to the hidden states. Every exact feature works; spans stay where "
        "they are.",
    ),
    "refused": (
        "Refused",
        "These configurations were tried and cannot be run. Loading such a model raises "
        "[`UnsupportedModelError`][kvloom.errors.UnsupportedModelError] with the reason.",
    ),
}
INTRODUCTION = """\
# Supported models

<!-- Written by tools/model_table.py; do not edit. -->

kvloom has no list of models. The [probe](adr/0003-the-probe.md) decides at load, by experiment,
whether it can reproduce a model's own numbers; `kvloom doctor MODEL` prints what it found. This
page shows the outcome for tiny random models, one per configuration, which the test suite
compares with plain transformers. A real checkpoint of the same type with other settings may fare
differently: ask `kvloom doctor`.

{count} configurations of {types} model types were tried: {movable} run with movable positions,
{opaque} with opaque and {absolute} with absolute ones, and {refused} are refused.
A name in brackets is the model type of transformers, where it differs.
"""


@dataclass(frozen=True)
class Outcome:
    """What the probe made of one entry of the catalogue.

    Attributes:
        name: the entry.
        model_type: transformers' name of the architecture.
        outcome: a key of `OUTCOMES`.
        found: what its layers are, or what kvloom says when it refuses.
        reason: why, as the catalogue has it.
    """

    name: str
    model_type: str
    outcome: str
    found: str
    reason: str


def probe_all(names: Sequence[str] = ()) -> list[Outcome]:
    """Probe the entries of the catalogue, or those named."""
    from tests.model.families import FAMILIES, build

    from kvloom.errors import UnsupportedModelError
    from kvloom.model.probe import probe

    outcomes = []
    for entry in FAMILIES:
        if names and entry.name not in names:
            continue
        try:
            spec = probe(build(entry)).spec
            outcome: tuple[str, str] = (spec.positions, describe(spec))
        except UnsupportedModelError as error:
            outcome = ("refused", without_figures(str(error)))
        model_type = entry.config().model_type
        outcomes.append(Outcome(entry.name, model_type, *outcome, entry.reason))
    return outcomes


def describe(spec: object) -> str:
    """Return in words what the layers of a model are; sizes of tiny models mean nothing."""
    from kvloom.types import ModelSpec

    assert isinstance(spec, ModelSpec)
    parts = [] if spec.positions != "movable" else [rotations(spec)]
    marks = {
        "window": [layer.window is not None for layer in spec.layers],
        "soft cap": [layer.softcap is not None for layer in spec.layers],
        "sinks": [layer.sinks for layer in spec.layers],
        "K and V of different size": [layer.k_dim != layer.v_dim for layer in spec.layers],
    }
    for mark, layers in marks.items():
        if any(layers):
            parts.append(mark if all(layers) else f"{mark} in some layers")
    parts += [without_figures(note) for note in spec.notes]
    return "; ".join(parts)


def rotations(spec: object) -> str:
    """Return the rotations that occur, in the order of the layers."""
    from kvloom.types import ModelSpec

    assert isinstance(spec, ModelSpec)
    words: dict[str, None] = {}
    tables: set[object] = set()
    for layer in spec.layers:
        rope = layer.rope
        if rope is None:
            words["no rotation"] = None
            continue
        tables.add(rope)
        part = ""
        if rope.num_dims < layer.k_dim:
            part = " on the head's start" if rope.first_dim == 0 else " on the head's end"
        words[f"{rope.layout}{part}"] = None
    several = f" ({len(tables)} tables)" if len(tables) > 1 else ""
    return ", ".join(words) + several


def without_figures(text: str) -> str:
    """Return a text without measured numbers, which differ from machine to machine."""
    return re.sub(r" \([\d.e+inf]+ times the tolerance\)", "", text)


def render(outcomes: Iterable[Outcome]) -> str:
    """Return the page."""
    outcomes = list(outcomes)
    counts = Counter(outcome.outcome for outcome in outcomes)
    page = INTRODUCTION.format(
        count=len(outcomes),
        types=len({outcome.model_type for outcome in outcomes}),
        **{key: counts[key] for key in OUTCOMES},
    )
    for key, (title, text) in OUTCOMES.items():
        rows = sorted(
            (outcome for outcome in outcomes if outcome.outcome == key), key=lambda row: row.name
        )
        page += f"\n## {title}\n\n{text}\n\n"
        found = "kvloom says" if key == "refused" else "layers"
        page += f"| configuration | {found} | remark |\n| --- | --- | --- |\n"
        for row in rows:
            kind = "" if row.model_type == row.name else f" ({row.model_type})"
            cells = (f"`{row.name}`{kind}", row.found, row.reason)
            page += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page or check it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.WARNING)
    page = render(probe_all())
    if not options.check:
        PAGE.write_text(page, encoding="utf-8")
    elif page != PAGE.read_text(encoding="utf-8"):
        sys.stderr.write("docs/models.md is stale; run python tools/model_table.py.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
