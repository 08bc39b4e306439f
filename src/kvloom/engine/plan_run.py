"""Carries out a planner's actions for the parts of one prompt, from left to right.

Knows: what each action asks for, and that repairs wait until something is computed behind them.
Does not know: why an action was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvloom.engine.building import Building, Watched
from kvloom.engine.holdings import PREFIX, Holdings
from kvloom.outputs import EditReceipt, PartAction
from kvloom.reuse.actions import Action, Planner, Repair, Shift, Wanted
from kvloom.reuse.planned import planned_rows
from kvloom.reuse.planner import Place, places
from kvloom.reuse.repair import RepairReceipt
from kvloom.types import SlotRange


class PlanRun:
    """A plan under way.

    Args:
        want: the prompt.
        planner: made the plan.
        holdings: where KV comes from.
        building: where it is shown.
        tenant: whose chunks they are.
    """

    def __init__(
        self,
        want: Wanted,
        planner: Planner,
        holdings: Holdings,
        building: Building,
        tenant: str,
    ) -> None:
        self._want = want
        self._planner = planner
        self._holdings = holdings
        self._building = building
        self._tenant = tenant
        self._places = list(places(want))
        self._waiting: list[Repair] = []
        self._actions: list[PartAction] = []
        self._repairs: list[RepairReceipt] = []

    def carry_out(self, place: Place, steps: Sequence[Action], *, is_known: bool) -> None:
        """Do with a part what its actions say; a repair waits.

        Args:
            place: of the part.
            steps: its actions.
            is_known: the exact KV of everything up to the part's end is known.
        """
        shift = next((step for step in steps if isinstance(step, Shift)), None)
        if shift is None:
            self._recompute(place, is_known=is_known)
        elif shift.held == PREFIX and is_known:  # is taken when something must stand behind it
            self.repair()
            self._actions.append(PartAction(place.number, "shift", variant=PREFIX))
        else:
            repairs = [step for step in steps if isinstance(step, Repair)]
            count = planned_rows(self._want, repairs).count
            length = len(place.part.tokens)
            brought = self._holdings.bring(place.number, place.part.tokens, shift, length - count)
            try:
                self._building.show(brought.doc, place.start)
            finally:
                self._holdings.let_go(brought.doc)
            self._actions += brought.actions
            self._waiting += repairs

    def repair(self) -> None:
        """Compute rows of shown parts again, as far as that waits."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        first, last = (self._places[waiting[number].part] for number in (0, -1))
        within = SlotRange(first.start, last.stop)
        rule = planned_rows(self._want, waiting)
        receipt = self._building.repair(rule, within)
        if receipt is None:
            return
        self._repairs.append(receipt)
        for one in waiting:
            rows = planned_rows(self._want, [one]).count
            self._actions.append(PartAction(one.part, "repair", rows))

    def note_rest(self, tokens: Sequence[int]) -> None:
        """Take note that what stands behind the parts is computed, as one part."""
        last = self._places[-1]
        if rows := len(tokens) - last.stop:
            self._actions.append(PartAction(last.number + 1, "recompute", rows))

    def added_to(self, receipt: EditReceipt, loaded_bytes: int) -> EditReceipt:
        """Return a receipt with what was done."""
        compared = [one for one in self._repairs if one.deviation is not None]
        rows = sum(one.stale for one in compared)
        deviation = left = None
        if rows:
            deviation = sum(one.stale * (one.deviation or 0.0) for one in compared) / rows
            left = sum(one.stale * (one.left or 0.0) for one in compared) / rows
        return replace(
            receipt,
            repaired=sum(one.repaired for one in self._repairs),
            deviation=deviation,
            deviation_left=left,
            actions=tuple(sorted(self._actions, key=lambda action: action.part)),
            loaded_bytes=loaded_bytes,
        )

    def _recompute(self, place: Place, *, is_known: bool) -> None:
        """Let a part be computed behind what stands before it as it will be."""
        self.repair()
        variant = ""
        if place.part.chunk is not None and self._planner.learns and not is_known:
            chunks = [one for one in self._places[: place.number + 1] if one.part.chunk]
            watched = Watched(
                names=tuple(str(one.part.chunk) for one in chunks),
                stretches=tuple(SlotRange(one.start, one.stop) for one in chunks),
                tenant=self._tenant,
            )
            variant = self._building.watch(place.start, watched)
        rows = len(place.part.tokens)
        if rows:
            self._actions.append(PartAction(place.number, "recompute", rows, variant=variant))
