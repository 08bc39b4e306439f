"""Repairs under way: one forward pass after another, beside the steps of requests.

Knows: whose repair goes on next, and that its document may not be forgotten meanwhile.
Does not know: what is repaired, or why.
"""

from __future__ import annotations

import logging

from kvloom.engine.memory import EngineMemory
from kvloom.engine.request import Event, Failed, Repaired
from kvloom.errors import CapacityError, KvloomError, as_kvloom_error
from kvloom.kv.pool import blocks_for
from kvloom.reuse.repair import Repair
from kvloom.types import Forward

logger = logging.getLogger(__name__)


class Repairs:
    """The repairs of one engine.

    Args:
        memory: makes room for repaired rows.
        runner: runs them.
    """

    def __init__(self, memory: EngineMemory, runner: Forward) -> None:
        self._memory = memory
        self._runner = runner
        self._open: dict[str, Repair] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, request_id: str, repair: Repair) -> None:
        """Take a repair; its document is a fork that nobody else holds."""
        self._memory.protect(repair.doc)
        self._open[request_id] = repair

    def step(self) -> list[Event]:
        """Run the next pass of the oldest repair."""
        request_id, repair = next(iter(self._open.items()))
        try:
            self._advance(repair)
        except Exception as error:
            self.cancel(request_id)
            if not isinstance(error, KvloomError):
                logger.exception("a repair failed")
            return [Failed(request_id, as_kvloom_error(error, "The repair"))]
        if not repair.finished:
            return []
        self._open.pop(request_id)
        # Held at once, so that it can be forgotten before its receiver takes it.
        self._memory.unprotect(repair.doc)
        return [Repaired(request_id, repair.doc, repair.receipt())]

    def cancel(self, request_id: str) -> None:
        """End a repair now; unknown ids are ignored."""
        repair = self._open.pop(request_id, None)
        if repair is not None:
            self._memory.forget(repair.doc)

    def _advance(self, repair: Repair) -> None:
        if not self._memory.make_room(blocks_for(repair.next_rows), repair.doc):
            raise CapacityError(
                f"The KV memory has no room for {repair.next_rows} repaired rows beside what runs; "
                "end other requests, repair a smaller share or raise kv_memory."
            )
        repair.advance(self._runner)
