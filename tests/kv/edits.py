"""A document under many edits beside a plain list of what it must show.

Knows: how plans are carried out on a world's documents, and the slow obvious way to edit a list.
Does not know: spans, segments or views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from kvloom.kv import edit as edits
from kvloom.kv.compact import compact
from kvloom.kv.doc import KVDoc
from kvloom.kv.execute import add_part
from kvloom.kv.fold import fold, plan_fold, write
from kvloom.kv.plan import Compute
from kvloom.types import Edit, KVLayout
from tests.kv.worlds import ROOT, TAIL, World, layer_spec
from tests.oracles import attend_row, embedded

LAYERS = (
    layer_spec(0, dims=(16, 16)),
    layer_spec(1, heads=3, kv_heads=1, dims=(16, 16), rope=TAIL, softcap=3.0, window=40),
)

Named = tuple[str, tuple[int, int, int]]
"""An edit by its name, with numbers that its places follow from."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One token with its unrotated keys and its values by layer."""

    token: int
    k: list[np.ndarray]
    v: list[np.ndarray]
    visible: bool = True


@dataclass
class Edited:
    """A document and the list of cells that it must equal."""

    world: World
    doc: KVDoc
    cells: list[Cell] = field(default_factory=list)

    @classmethod
    def new(
        cls,
        seed: int,
        length: int,
        start_pos: int = 0,
        layout: KVLayout = "plain",
        done: Iterable[Named] = (),
    ) -> Edited:
        world = World(seed, LAYERS, 120, layout)
        made = cls(world, KVDoc(world.pool, ROOT, start_pos=start_pos))
        made.run(edits.Append(tuple(world.random.integers(0, 50, length).tolist())))
        for name, numbers in done:
            made.do(name, numbers)
        return made

    def cells_of(self, tokens: list[int], slots: np.ndarray) -> list[Cell]:
        k, v = self.world.k, self.world.v
        return [
            Cell(token, [x[:, slot].copy() for x in k], [x[:, slot].copy() for x in v])
            for token, slot in zip(tokens, slots.tolist(), strict=True)
        ]

    def run(self, edit: Edit) -> list[Cell]:
        """Carry an edit out as the engine does; return the cells that were computed."""
        built = KVDoc(self.world.pool, ROOT, start_pos=self.doc.start_pos)
        fresh: list[Cell] = []
        for part in self.doc.apply(edit).parts:
            if isinstance(part, Compute):
                slots = self.world.append_tokens(built, part.tokens)
                fresh += self.cells_of(list(part.tokens), slots)
            else:
                add_part(built, self.doc, part)
        for span in built.spans:  # copies of a transplant are in slots the world knows nothing of
            self.world.pos[slice(*span.pool_slots)] = span.pos - span.shift
        self.doc.close()
        self.doc = built
        if isinstance(edit, edits.Append):
            self.cells += fresh
        return fresh

    def insert(self, a: int, b: int, c: int) -> None:
        tokens = tuple(range(c % 9))
        self.cells[a:a] = self.run(edits.Insert(a, tokens))

    def delete(self, a: int, b: int, c: int) -> None:
        self.run(edits.Delete(a, b))
        del self.cells[a:b]

    def replace(self, a: int, b: int, c: int) -> None:
        self.cells[a:b] = self.run(edits.Replace(a, b, tuple(range(c % 40))))

    def rewrite(self, a: int, b: int, c: int) -> None:
        """Put as many tokens in as are taken out, so that nothing behind them moves."""
        b = min(b, a + 1 + c % 5)
        self.cells[a:b] = self.run(edits.Replace(a, b, tuple(range(b - a))))

    def move(self, a: int, b: int, c: int) -> None:
        to = c % (len(self.cells) - (b - a) + 1)
        self.run(edits.Move(a, b, to))
        moved = self.cells[a:b]
        del self.cells[a:b]
        self.cells[to:to] = moved

    def several(self, a: int, b: int, c: int) -> None:
        fresh = self.run(edits.Several((edits.Delete(a, b), edits.Insert(b, (1, 2)))))
        self.cells[a:b] = fresh

    def splice(self, a: int, b: int, c: int) -> None:
        """Put a copy of a stretch of the document itself at another place."""
        source = self.doc.fork()
        built = KVDoc(self.world.pool, ROOT, start_pos=3)
        for part in source.apply(edits.Delete(0, a)).parts:
            add_part(built, source, part)
        place = c % (len(self.cells) + 1)
        self.run(edits.Splice(place, built.spans))
        self.cells[place:place] = self.cells[a:]
        source.close()
        built.close()

    def truncate(self, a: int, b: int, c: int) -> None:
        self.doc.truncate(b)
        del self.cells[b:]

    def repair(self, a: int, b: int, c: int) -> None:
        """Compute every few tokens of a stretch again, in any order."""
        places = self.world.random.permutation(np.arange(a, b, 1 + c % 4))
        if len(places):
            tokens = [self.cells[place].token for place in places]
            slots = self.world.overlay(self.doc, places + self.doc.start_pos, tokens)
            for place, cell in zip(places, self.cells_of(tokens, slots), strict=True):
                self.cells[place] = cell

    def prune(self, a: int, b: int, c: int) -> None:
        """Hide every few tokens of a stretch."""
        places = np.arange(a, b, 1 + c % 5)
        self.doc.close_tail()
        spans = [span.without(places + self.doc.start_pos) for span in self.doc.spans]
        pruned = KVDoc(self.world.pool, ROOT, spans, start_pos=self.doc.start_pos)
        self.doc.close()
        self.doc = pruned
        for place in places:
            self.cells[place] = replace(self.cells[place], visible=False)

    def compact(self, a: int, b: int, c: int) -> None:
        """Let the document lie together."""
        compact(self.doc)
        self.note_places()

    def note_places(self) -> None:
        """Let the world know of slots that were moved."""
        for span in self.doc.spans:
            self.world.pos[slice(*span.pool_slots)] = span.pos - span.shift
            if span.segment.placed:
                self.world.overlays.add(span.segment)

    def do(self, name: str, numbers: tuple[int, int, int]) -> None:
        a, b = sorted(number % (len(self.cells) + 1) for number in numbers[:2])
        deed: Callable[[int, int, int], None] = getattr(self, name)
        if len(self.cells) < 700 or name in {"delete", "truncate"}:
            deed(a, b, numbers[2])

    def decoded(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what a row behind the document attends to: by the fold, and by the list."""
        spec, view = self.world.layers[layer], self.doc.fork()
        pos = np.array([self.doc.start_pos + len(self.cells)])
        slots = self.world.append_unwritten(view, 1)
        plan = plan_fold([view], [pos], [slots], {spec.window})
        write(plan, layer, *self.world.fresh(layer, slots))
        q, rotated = self.world.query(layer, pos)
        out = fold(plan, spec, rotated, scale=self.world.scale(layer))[:, 0].numpy()
        cells = [*self.cells, *self.cells_of([0], slots)]
        view.close()
        key_pos = self.doc.start_pos + np.arange(len(cells))
        seen = np.array([cell.visible for cell in cells])
        if spec.window is not None:
            seen &= key_pos > pos[0] - spec.window
        k = np.stack([cell.k[layer] for cell in cells], axis=1)
        v = np.stack([cell.v[layer] for cell in cells], axis=1)
        expected = attend_row(
            embedded(q[:, 0], float(pos[0]), spec.rope),
            embedded(k, key_pos, spec.rope)[:, seen],
            v[:, seen],
            scale=self.world.scale(layer),
            bias=np.zeros(int(seen.sum())),
            softcap=spec.softcap,
            sink=None,
        )
        return out, expected.o


SMALL = ["insert", "delete", "rewrite", "truncate", "repair", "prune", "compact"]
LARGE = ["replace", "move", "several", "splice"]
names = st.sampled_from([*SMALL, *LARGE, "repair"])
deeds = st.lists(
    st.tuples(names, st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))),
    max_size=8,
)
