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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvloom.cost import MEMORY, CostModel
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.plan import placed_at
from kvloom.kv.pool import Pool, block_bytes
from kvloom.kv.span import cut
from kvloom.model.open import OpenedModel, OpenOptions, open_model
from kvloom.ops.rope import rotate, shift_table
from kvloom.reuse.actions import Held, Part, Wanted
from kvloom.reuse.actions import Repair as Planned
from kvloom.reuse.mass import MassObserver, chunk_statistics
from kvloom.reuse.planned import planned_rows
from kvloom.reuse.planner import planner
from kvloom.reuse.repair import Repair, stale_rows, values_at
from kvloom.reuse.select import SELECTORS, Selector
from kvloom.types import Forward, Rows, SlotRange

FILES = ["textwrap", "heapq", "queue", "shelve", "bisect", "sched", "cmd", "string", "stat", "glob"]
FILES += ["fnmatch", "getopt"]
CHUNKS, CHUNK, NEXT, SINK = 4, 48, 24, 2
EVERYTHING_PAYS = CostModel(30, 1, 0.0, 1.0, 0.0, 1.0, 0.0, {})
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

    def shown(self, doc: KVDoc, layer: int, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return keys turned to where they stand now, and values, of places of a document."""
        rope = self.runner.spec.layers[layer].rope
        assert rope is not None
        keys, values, place = [], [], 0
        for span in doc.order:
            low, high = np.searchsorted(places, (place, place + span.length))
            k, v = doc.pool.read(layer, *span.pool_slots)
            rows = torch.from_numpy(places[low:high] - place)
            keys.append(rotate(k[:, rows], *shift_table(rope, span.shift), rope))
            values.append(v[:, rows])
            place += span.length
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

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

    A row that is dropped shows, at the layers behind, what was cached; it is computed on, and
    nobody sees that. So a runner that computes all rows gives what one that computes fewer would.
    """

    def __init__(self, bench: Bench, doc: KVDoc, places: np.ndarray, counts: list[int]) -> None:
        self._bench, self._doc, self._old = bench, doc, doc.fork()
        self._places, self._counts = places, counts
        self._kept = np.ones(len(places), dtype=bool)

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Put back what was cached of dropped rows, then drop more for the next layer."""
        self._restore(layer)
        if layer:
            change = (v - values_at(self._old, layer, self._places)).square().sum(dim=(0, 2))
            order = np.argsort(-np.where(self._kept, change.numpy(), -1.0), kind="stable")
            self._kept = np.zeros_like(self._kept)
            self._kept[order[: self._counts[layer]]] = True

    def close(self) -> None:
        """Let go of the document as it was."""
        self._old.close()

    def _restore(self, layer: int) -> None:
        dropped = ~self._kept
        overlays = [span for span in self._doc.spans if span.segment.placed]
        slots = np.concatenate([np.arange(*span.pool_slots) for span in overlays])
        if dropped.any():
            k, v = self._bench.shown(self._old, layer, self._places[dropped])
            self._doc.pool.write(layer, torch.from_numpy(slots[dropped]), k, v)


def gradually(bench: Bench, doc: KVDoc, rows: int) -> KVDoc:
    """Return a document repaired by CacheBlend's gradual schedule: 1.33 r to 0.67 r."""
    last = len(bench.runner.spec.layers) - 1
    counts = [round(rows * (1.33 - 0.66 * max(n - 1, 0) / (last - 1))) for n in range(last + 1)]
    trial = repaired(bench, doc.fork(), counts[0], SELECTORS["blend"])
    overlaid = [span.pos for span in trial.spans if span.segment.placed]
    trial.close()
    places = np.sort(np.concatenate(overlaid))
    narrowing = Narrowing(bench, doc, places, counts)
    tokens = np.array(doc.tokens)[places]
    bench.runner.forward([Rows(doc, tokens, places, "none", "overlay")], observe=narrowing)
    narrowing.close()
    return doc


def of_every_chunk(text: Text, rows: int) -> Selector:
    """Return the selector of the planner `blend`: a share of every chunk but the first."""
    want = Wanted(ROOT, tuple(Part(tuple(chunk.tolist())) for chunk in text.chunks))
    share = rows / ((CHUNKS - 1) * CHUNK)
    return planned_rows(want, [Planned(n, share, "blend") for n in range(1, CHUNKS)])


def by_old_attention(bench: Bench, text: Text) -> tuple[KVDoc, int, Selector]:
    """Return chunks as a request had them the other way round, and what Cache-Craft repairs."""
    names = [str(number) for number in reversed(range(CHUNKS))]
    whole = KVDoc(bench.pool, ROOT)
    tokens = np.concatenate(text.chunks[::-1])
    parts = [SlotRange(n * CHUNK, (n + 1) * CHUNK) for n in range(CHUNKS)]
    scales = [layer.k_dim**-0.5 for layer in bench.runner.spec.layers]
    # The very first token is the attention sink, which is no part of any chunk.
    inner = [SlotRange(1, CHUNK), *parts[1:]]
    seen = MassObserver(whole, np.arange(len(tokens)), inner, bench.runner.spec, scales)
    bench.runner.forward([Rows(whole, tokens, np.arange(len(tokens)), "none")], observe=seen)
    whole.close_tail()
    doc, actions, have = KVDoc(bench.pool, ROOT), [], {}
    for number in range(CHUNKS):
        place = CHUNKS - 1 - number
        pieces = cut(whole.order, place * CHUNK, (place + 1) * CHUNK)
        doc.extend(placed_at(pieces, doc.end_pos))
        statistics = chunk_statistics([seen.found], inner, names, place) if place else None
        have[str(number)] = [Held(str(number), None, place * CHUNK, MEMORY, statistics)]
    chunks = (Part(tuple(c.tolist()), str(n)) for n, c in enumerate(text.chunks))
    want = Wanted(ROOT, tuple(chunks))
    actions = planner("craft").plan(want, have, EVERYTHING_PAYS, "repaired")
    whole.close()
    rule = planned_rows(want, actions)
    return doc, rule.count, rule


def variants(bench: Bench, text: Text) -> Iterator[tuple[str, KVDoc]]:
    """Yield every way of joining, by name."""
    blend, random = SELECTORS["blend"], SELECTORS["random"]

    def alone() -> KVDoc:
        return bench.joined(text, sink=False)

    yield "naive", alone()
    yield "behind a sink since dropped", bench.joined(text, sink=True)
    yield "first 2 of each", repaired(bench, alone(), 2 * (CHUNKS - 1), SELECTORS["first"])
    yield "first 4 of each", repaired(bench, alone(), 4 * (CHUNKS - 1), SELECTORS["first"])
    for percent in (15, 30):
        rows = round(CHUNKS * CHUNK * percent / 100)
        yield f"{percent} % by value", repaired(bench, alone(), rows, blend)
        yield (
            f"{percent} % by value of every chunk",
            repaired(bench, alone(), rows, of_every_chunk(text, rows)),
        )
        yield f"{percent} % gradual", gradually(bench, alone(), rows)
        yield f"{percent} % random", repaired(bench, alone(), rows, random)
        sunk = bench.joined(text, sink=True)
        yield f"{percent} % by value, sink", repaired(bench, sunk, rows, blend)
    yield "all", repaired(bench, alone(), (CHUNKS - 1) * CHUNK, blend)
    yield "other order, naive", by_old_attention(bench, text)[0]
    doc, count, rule = by_old_attention(bench, text)
    print(f"  Cache-Craft repairs {count} of {CHUNKS * CHUNK} rows")
    yield "other order, Cache-Craft", repaired(bench, doc, count, rule)
    for name in ("blend", "random", "first"):
        doc = by_old_attention(bench, text)[0]
        yield f"other order, {name}, as many", repaired(bench, doc, count, SELECTORS[name])


def read_text(model: OpenedModel, name: str) -> Text:
    """Return a module of the standard library as chunks."""
    source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
    tokens = np.array(model.tokenizer.encode(source)[: CHUNKS * CHUNK + NEXT], dtype=np.int64)
    chunks = tuple(tokens[n * CHUNK : (n + 1) * CHUNK] for n in range(CHUNKS))
    sink = np.array(model.tokenizer.encode("\n\n\n#")[:SINK], dtype=np.int64)
    if model.tokenizer.bos_token_id is not None:
        sink[0] = model.tokenizer.bos_token_id
    return Text(chunks, tokens[CHUNKS * CHUNK :], sink)


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    model = open_model("default", OpenOptions(dtype="float32"))
    layers = model.runner.spec.layers
    bench = Bench(model.runner, Pool(layers, 40 * block_bytes(layers, torch.float32)))
    sums: dict[str, list[float]] = {}
    for name in FILES[:count]:
        text = read_text(model, name)
        truth = bench.behind(bench.computed(np.concatenate(text.chunks)), text)
        for label, doc in variants(bench, text):
            found = bench.behind(doc, text)
            kl = (truth.exp() * (truth - found)).sum(-1).mean()
            sums.setdefault(label, []).append(float(kl))
        print(name, *(f"{values[-1]:.4f}" for values in sums.values()), flush=True)
    for label, values in sums.items():
        print(f"{label:32s} {np.mean(values):.4f}")


if __name__ == "__main__":
    main()
