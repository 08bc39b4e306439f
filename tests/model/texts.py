"""Documents under way on any runner, held against transformers' logits of their whole texts.

Knows: how to go on with several documents in one step, and how to score rows anywhere in them.
Does not know: any runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool
from kvloom.types import Forward
from tests.model.running import (
    ROOT,
    assert_same,
    owned_blocks,
    plain_logits,
    pool_for,
    rows_of,
    some_tokens,
)


class Texts:
    """Documents under way, held against transformers' logits of their whole texts."""

    def __init__(
        self,
        plain: Any,
        runner: Forward,
        lengths: Sequence[int],
        seed: int,
        pool: Pool | None = None,
        kind: str = "float32",
    ) -> None:
        self.runner = runner
        self.kind = kind
        self.pool = pool_for(runner) if pool is None else pool
        self.tokens = [some_tokens(count, seed + n) for n, count in enumerate(lengths)]
        self.truth = [plain_logits(plain, tokens) for tokens in self.tokens]
        self.docs = [KVDoc(self.pool, ROOT) for _ in lengths]

    def go_on(self, counts: dict[int, int]) -> None:
        """Run the next tokens of some documents in one step, in the order given."""
        starts = {n: self.docs[n].length for n in counts}
        stops = {n: min(starts[n] + count, len(self.tokens[n])) for n, count in counts.items()}
        going = [n for n in counts if stops[n] > starts[n]]
        if not going:
            return
        rows = [rows_of(self.docs[n], self.tokens[n][starts[n] : stops[n]]) for n in going]
        for n, logits in zip(going, self.runner.forward(rows).logits, strict=True):
            assert_same(logits, self.truth[n][starts[n] : stops[n]], self.kind)

    def scatter(self, places: dict[int, list[int]]) -> None:
        """Recompute some positions of some documents in one step, in the order given."""
        rows = [
            rows_of(self.docs[n], self.tokens[n][pos], pos, write="none")
            for n, pos in places.items()
        ]
        before = [(doc.tokens, doc.exact_length()) for doc in self.docs]
        for n, logits in zip(places, self.runner.forward(rows).logits, strict=True):
            assert_same(logits, self.truth[n][places[n]], self.kind)
        assert [(doc.tokens, doc.exact_length()) for doc in self.docs] == before
        assert self.pool.owners().tolist() == owned_blocks(self.pool, self.docs).tolist()

    def finish(self) -> None:
        """Run all that is left, in one step."""
        self.go_on({n: len(tokens) for n, tokens in enumerate(self.tokens)})

    def close(self) -> None:
        """Give every block back."""
        for doc in self.docs:
            doc.close()
        assert self.pool.free_blocks == self.pool.num_blocks
