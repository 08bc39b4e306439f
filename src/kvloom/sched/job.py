"""What the scheduler knows of a sequence, and what it asks of memory.

Knows: counts of tokens and rows.
Does not know: tensors, documents or texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

Admission = Literal["admitted", "no room", "wait for a prefix", "wait for the store"]


class JobState(Enum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Job:
    """A sequence as the scheduler sees it.

    Attributes:
        arrival: lower arrived earlier; the later of two loses its memory first.
        num_tokens: tokens known so far.
        num_computed: of these, tokens whose KV exists or is being computed in this step.
        state: where it stands.
        preemptions: how often it lost its memory.
    """

    arrival: int
    num_tokens: int
    num_computed: int = 0
    state: JobState = JobState.WAITING
    preemptions: int = 0

    @property
    def pending(self) -> int:
        """Rows that are known and not computed."""
        return self.num_tokens - self.num_computed


class Memory(Protocol):
    """What the scheduler asks of whoever owns the KV memory."""

    def begin_step(self) -> None:
        """Forget the promises of the last step."""
        ...

    def admit(self, job: Job) -> Admission:
        """Give a waiting job its document, with what is known of it already; sets `num_computed`.

        Leaves no trace unless it answers "admitted".
        """
        ...

    def promise(self, job: Job, num_rows: int) -> bool:
        """Make sure that so many rows can be appended in this step; may forget idle documents."""
        ...

    def withdraw(self, job: Job) -> None:
        """Take a running job's memory away, and with it this step's promise; called once."""
        ...
