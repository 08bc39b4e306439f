"""The watcher: runs rows of a document and takes note of what they attend to.

Knows: the runner, and that room must be made before rows are run.
Does not know: chunks, or what the sums are good for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvloom.engine.memory import EngineMemory
from kvloom.errors import CapacityError, KvloomError
from kvloom.kv.doc import KVDoc
from kvloom.reuse.mass import MassObserver, RowMass
from kvloom.types import Forward, Rows, SlotRange


class Watcher:
    """Runs watched rows between the steps of one engine.

    Args:
        memory: makes room for the rows.
        runner: runs them.
    """

    def __init__(self, memory: EngineMemory, runner: Forward) -> None:
        self._memory = memory
        self._runner = runner

    def run(self, doc: KVDoc, tokens: Sequence[int], parts: Sequence[SlotRange]) -> RowMass:
        """Append tokens to a protected document, in one pass, and return what they attended to.

        Args:
            doc: grows by the tokens.
            tokens: at least one.
            parts: stretches of positions, ascending and disjoint, the rows' own among them.

        Raises:
            CapacityError: the KV memory has no room for the rows.
            UnsupportedModelError: the model's attention cannot be watched.
        """
        if not self._memory.make_room(doc.blocks_needed(len(tokens)), doc):
            raise CapacityError(
                f"The KV memory has no room for {len(tokens)} rows beside what runs; end other "
                "requests, shorten the prompt or raise kv_memory."
            )
        pos = np.arange(doc.end_pos, doc.end_pos + len(tokens), dtype=np.int64)
        seen = MassObserver(doc, pos, parts, self._runner.spec, self._runner.scales)
        rows = Rows(doc, np.asarray(tokens, dtype=np.int64), pos, "none")
        try:
            self._runner.forward([rows], observe=seen)
        except KvloomError:
            raise
        except Exception as error:
            raise KvloomError(f"A pass failed ({type(error).__name__}: {error}).") from error
        return seen.found
