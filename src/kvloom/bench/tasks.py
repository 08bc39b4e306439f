"""The tasks of the speed bench, as one table.

Knows: sizes, what is timed, and what a task costs roughly.
Does not know: engines, or the text of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvloom import RequestError

FigureName = Literal["prefill", "decode", "throughput", "first_token"]
Way = Literal["exact", "repaired", "shifted", "restarted"]

# A generated token takes about as long as this many prompt tokens; for the time left only.
_DECODE_WEIGHT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing that is timed.

    Attributes:
        name: how the user selects it, such as "prefill-512"; the part before "-" is its family.
        title: how the table calls it.
        figure: which figure is made of the times.
        prompt_tokens: length of each prompt; all are sent at once.
        new_tokens: tokens generated for each prompt.
        shared_tokens: tokens at the start of the prompt that were computed by an earlier request.
        edited_tokens: tokens in the middle that were put in since an earlier request computed the
            whole text; 0 if it is no edit. Another place is edited in each round.
        replaced_tokens: tokens that stood there before.
        way: how what was computed earlier is used: `exact` takes of it what a fresh prefill would
            have, `repaired` and `shifted` keep what is behind the edit as well, `restarted` is
            exact and begins with the engine started anew. Engines need not have the others.
        held_against: name of the task that does the same with more work; empty for none.
    """

    name: str
    title: str
    figure: FigureName
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    shared_tokens: int = 0
    edited_tokens: int = 0
    replaced_tokens: int = 0
    way: Way = "exact"
    held_against: str = ""

    @property
    def approximate(self) -> bool:
        """Whether the tokens generated need not be those of an exact computation."""
        return self.way in ("repaired", "shifted")

    @property
    def family(self) -> str:
        """The name that selects this task and its like."""
        return self.name.partition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the tasks are.

    Attributes:
        prefill: prompt lengths.
        decode: context lengths.
        decode_tokens: tokens generated behind a context.
        batch: prompt lengths of the prompts that are sent at once.
        batch_tokens: tokens generated for each of them.
        shared: length of the prefix that two requests share.
        question: tokens behind that prefix.
        edited: length of a text in which a line is changed.
        line: tokens of that line.
        old_line: tokens of the line that it replaces; another number, so that what is behind moves.
        judged: tokens generated behind an approximate edit, to be held against exact ones.
        restarted: length of a prompt that is sent again after a restart.
    """

    prefill: tuple[int, ...] = (512, 2048, 6000)
    decode: tuple[int, ...] = (512, 4096)
    decode_tokens: int = 64
    batch: tuple[int, ...] = tuple(50 + 250 * place // 15 for place in range(16))
    batch_tokens: int = 64
    shared: int = 3000
    question: int = 32
    edited: int = 4000
    line: int = 12
    old_line: int = 9
    judged: int = 16
    restarted: int = 4000


FULL = Sizes()
QUICK = Sizes(
    prefill=(64,),
    decode=(48,),
    decode_tokens=8,
    batch=(10, 20, 30, 40),
    batch_tokens=8,
    shared=64,
    question=8,
    edited=72,
    line=4,
    old_line=3,
    judged=4,
    restarted=64,
)


def make_tasks(sizes: Sizes) -> list[Task]:
    """Return all tasks in these sizes."""
    tasks = [
        Task(
            name=f"prefill-{size}",
            title=f"prefill {size:,}",
            figure="prefill",
            prompt_tokens=(size,),
            new_tokens=1,
        )
        for size in sizes.prefill
    ]
    tasks += [
        Task(
            name=f"decode-{size}",
            title=f"decode at {size:,}",
            figure="decode",
            prompt_tokens=(size,),
            new_tokens=sizes.decode_tokens,
        )
        for size in sizes.decode
    ]
    tasks.append(
        Task(
            name=f"batch-{len(sizes.batch)}",
            title=f"{len(sizes.batch)} prompts at once",
            figure="throughput",
            prompt_tokens=sizes.batch,
            new_tokens=sizes.batch_tokens,
        )
    )
    return [*tasks, *_shared_prefix_tasks(sizes), *_edit_tasks(sizes), *_restart_tasks(sizes)]


def _shared_prefix_tasks(sizes: Sizes) -> list[Task]:
    cold = Task(
        name="shared-cold",
        title=f"first token, {sizes.shared + sizes.question:,} cold",
        figure="first_token",
        prompt_tokens=(sizes.shared + sizes.question,),
        new_tokens=1,
    )
    warm = Task(
        name="shared-warm",
        title=f"first token, {sizes.shared:,} shared",
        figure="first_token",
        prompt_tokens=(sizes.shared + sizes.question,),
        new_tokens=1,
        shared_tokens=sizes.shared,
        held_against=cold.name,
    )
    return [cold, warm]


def _edit_tasks(sizes: Sizes) -> list[Task]:
    exact = Task(
        name=f"edit-{sizes.edited}",
        title=f"first token, one line of {sizes.edited:,} changed",
        figure="first_token",
        prompt_tokens=(sizes.edited,),
        new_tokens=1,
        edited_tokens=sizes.line,
        replaced_tokens=sizes.old_line,
    )
    ways: tuple[Way, ...] = ("repaired", "shifted")
    return [
        exact,
        *(
            replace(
                exact,
                name=f"{exact.name}-{way}",
                title=f"{exact.title}, {way}",
                new_tokens=sizes.judged,
                way=way,
                held_against=exact.name,
            )
            for way in ways
        ),
    ]


def _restart_tasks(sizes: Sizes) -> list[Task]:
    cold = Task(
        name="restart-cold",
        title=f"first token, {sizes.restarted:,} cold",
        figure="first_token",
        prompt_tokens=(sizes.restarted,),
        new_tokens=1,
    )
    warm = replace(
        cold,
        name="restart-warm",
        title=f"first token, {sizes.restarted:,} known before a restart",
        shared_tokens=sizes.restarted - 1,
        way="restarted",
        held_against=cold.name,
    )
    return [cold, warm]


def choose_tasks(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """Return the tasks that are named, or whose family is; no name chooses all.

    Raises:
        RequestError: a name is unknown.
    """
    known = {task.name for task in tasks} | {task.family for task in tasks}
    for name in names:
        if name not in known:
            raise RequestError(
                f"{name!r} is no task; known are: {', '.join(sorted(known))}.", param="tasks"
            )
    return [task for task in tasks if not names or {task.name, task.family} & set(names)]


def work_units(task: Task) -> int:
    """Return roughly how long one round of a task takes, in prompt tokens."""
    computed = sum(task.prompt_tokens) - (0 if task.way == "restarted" else task.shared_tokens)
    at_once = max(1, len(task.prompt_tokens) // 4)
    return computed + _DECODE_WEIGHT * task.new_tokens * at_once
