"""Measures what joining chunks cached alone costs, and what repairing some of their rows saves.

Knows: pieces of the standard library as texts, documents, repairs and the default model in fp32.
Does not know: engines or requests.

Run it from a checkout: `python tools/joined_chunks.py [files]`. It prints the mean KL divergence of
the next-token distribution to a full prefill, over the tokens behind the joined chunks. Source of
the set-up: CacheBlend (Yao et al. 2025), insights 1 and 2, at a size that a laptop runs in minutes.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.plan import placed_at
from kvloom.kv.pool import Pool, block_bytes
from kvloom.kv.span import cut
from kvloom.model.open import OpenedModel, OpenOptions, open_model
from kvloom.ops.rope import rotate, shift_table
from kvloom.reuse.repair import Repair, stale_rows, values_at
from kvloom.reuse.select import SELECTORS, Selector
from kvloom.types import Forward, Rows

FILES = ["textwrap", "heapq", "queue", "shelve", "bisect", "sched", "cmd", "string", "stat", "glob"]
FILES += ["fnmatch", "getopt"]
CHUNKS, CHUNK, NEXT, SINK = 4, 48, 24, 2
ROOT = Lineage.root(b"measurement")


@dataclass(frozen=True)
class Text:
    """One text: chunks, and what stands behind them."""

    chunks: tuple[np.ndarray, ...]
    behind: np.ndarray
    sink: np.ndarray


@dataclass(frozen=True)
class Bench:
    """A runner on its pool."""

    runner: Forward
    pool: Pool

    def computed(self, tokens: np.ndarray) -> KVDoc:
        """Return a document of tokens computed in one pass."""
        doc = KVDoc(self.pool, ROOT)
        self.runner.forward([Rows(doc, tokens, np.arange(len(tokens)), "none")])
        return doc

    def joined(self, text: Text, *, sink: bool) -> KVDoc:
        """Return the chunks side by side, each computed alone, or behind a prefix since dropped."""
        doc = KVDoc(self.pool, ROOT)
        for number, chunk in enumerate(text.chunks):
            prefix = text.sink if sink and number else text.sink[:0]
            alone = self.computed(np.concatenate([prefix, chunk]))
            alone.close_tail()
            pieces = cut(alone.order, len(prefix), alone.length)
            doc.extend(placed_at(pieces, doc.end_pos))
            alone.close()
        return doc

    def behind(self, doc: KVDoc, text: Text) -> Tensor:
        """Return log-probabilities (s, v) behind a document, which is closed."""
        pos = np.arange(doc.end_pos, doc.end_pos + len(text.behind))
        (logits,) = self.runner.forward([Rows(doc, text.behind, pos, "all", "none")]).logits
        assert logits is not None
        doc.close()
        return logits.log_softmax(-1)


def repaired(bench: Bench, doc: KVDoc, rows: int, rule: Selector) -> KVDoc:
    """Return a document with so many rows computed again."""
    repair = Repair(doc, rows / len(stale_rows(doc).place), rule, 512)
    while not repair.finished:
        repair.advance(bench.runner)
    return doc


class Narrowing:
    """Keeps fewer of the rows that a pass computes from layer to layer.

    A row that is dropped shows at the layers behind what was cached; it is computed on, and nobody
    sees that. So a runner that computes all rows gives what one that computes fewer would give.
    """

    def __init__(self, old: KVDoc, doc: KVDoc, places: np.ndarray, counts: list[int]) -> None:
        self._old, self._doc, self._places, self._counts = old, doc, places, counts
        self._kept = np.ones(len(places), dtype=bool)
        self.late = False
        """Whether the rows of a layer are chosen at the layer before, as in the paper."""

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Put back the cached keys and values of dropped rows."""
        if self.late:
            self._restore(layer)
        if layer:
            change = (v - values_at(self._old, layer, self._places)).square().sum(dim=(0, 2))
            order = np.argsort(-np.where(self._kept, change.numpy(), -1.0), kind="stable")
            self._kept = np.zeros_like(self._kept)
            self._kept[order[: self._counts[layer]]] = True
        if not self.late:
            self._restore(layer)

    def _restore(self, layer: int) -> None:
        dropped = self._places[~self._kept]
        slots = np.concatenate(
            [np.arange(*span.pool_slots) for span in self._doc.spans if span.segment.placed]
        )[~self._kept]
        if len(dropped):
            k, v = _shown(self._old, layer, dropped)
            self._doc.pool.write(layer, torch.from_numpy(slots), k, v)


def _shown(doc: KVDoc, layer: int, places: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return keys turned to where they stand now, and values, of places of a document."""
    keys, values, place = [], [], 0
    for span in doc.order:
        low, high = np.searchsorted(places, (place, place + span.length))
        k, v = doc.pool.read(layer, *span.pool_slots)
        rows = torch.from_numpy(places[low:high] - place)
        rope = LAYERS[layer].rope
        assert rope is not None
        keys.append(rotate(k[:, rows], *shift_table(rope, span.shift), rope))
        values.append(v[:, rows])
        place += span.length
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def gradually(bench: Bench, doc: KVDoc, rows: int, *, late: bool) -> KVDoc:
    """Return a document repaired by CacheBlend's gradual schedule: 1.33 r to 0.67 r."""
    last = len(LAYERS) - 1
    counts = [round(rows * (1.33 - 0.66 * max(n - 1, 0) / (last - 1))) for n in range(last + 1)]
    rule = SELECTORS["blend"]
    trial = doc.fork()
    repair = Repair(trial, counts[0] / len(stale_rows(doc).place), rule, 512)
    repair.advance(bench.runner)
    places = repair._chosen
    assert places is not None
    trial.close()
    old = doc.fork()
    narrowing = Narrowing(old, doc, places, counts)
    narrowing.late = late
    tokens = np.array(doc.tokens)[places]
    bench.runner.forward([Rows(doc, tokens, places, "none", "overlay")], observe=narrowing)
    old.close()
    return doc


def variants(bench: Bench, text: Text) -> Iterator[tuple[str, KVDoc]]:
    """Yield every way of joining, by name."""
    total = CHUNKS * CHUNK
    blend, first, random = (SELECTORS[name] for name in ("blend", "first", "random"))

    def alone() -> KVDoc:
        return bench.joined(text, sink=False)

    yield "naive", alone()
    yield "behind a sink since dropped", bench.joined(text, sink=True)
    yield "first 2 of each", repaired(bench, alone(), 2 * (CHUNKS - 1), first)
    for percent in (15, 30):
        rows = round(total * percent / 100)
        yield f"{percent} % by value", repaired(bench, alone(), rows, blend)
        yield f"{percent} % gradual", gradually(bench, alone(), rows, late=False)
        yield f"{percent} % gradual, a layer ahead", gradually(bench, alone(), rows, late=True)
        yield f"{percent} % random", repaired(bench, alone(), rows, random)
        yield (
            f"{percent} % by value, sink",
            repaired(bench, bench.joined(text, sink=True), rows, blend),
        )
    yield "all", repaired(bench, alone(), total - CHUNK, blend)


def read_text(model: OpenedModel, name: str) -> Text:
    """Return a module of the standard library as chunks."""
    source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
    tokens = np.array(model.tokenizer.encode(source)[: CHUNKS * CHUNK + NEXT], dtype=np.int64)
    chunks = tuple(tokens[n * CHUNK : (n + 1) * CHUNK] for n in range(CHUNKS))
    sink = np.array(model.tokenizer.encode("\n\n\n#")[:SINK], dtype=np.int64)
    if model.tokenizer.bos_token_id is not None:
        sink[0] = model.tokenizer.bos_token_id
    return Text(chunks, tokens[CHUNKS * CHUNK :], sink)


model = open_model("default", OpenOptions(dtype="float32"))
LAYERS = model.runner.spec.layers


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    pool = Pool(LAYERS, 40 * block_bytes(LAYERS, torch.float32))
    bench = Bench(model.runner, pool)
    sums: dict[str, list[float]] = {}
    for name in FILES[:count]:
        text = read_text(model, name)
        truth = bench.behind(bench.computed(np.concatenate(text.chunks)), text)
        for label, doc in variants(bench, text):
            found = bench.behind(doc, text)
            kl = (truth.exp() * (truth - found)).sum(-1).mean()
            sums.setdefault(label, []).append(float(kl))
        assert pool.free_blocks == pool.num_blocks, "a block leaked"
        print(name, *(f"{values[-1]:.4f}" for values in sums.values()), flush=True)
    for label, values in sums.items():
        print(f"{label:30s} {np.mean(values):.4f}")


if __name__ == "__main__":
    main()
