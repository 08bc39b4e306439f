"""The prompts of the bench: source text of Python's standard library, cut to exact lengths.

Knows: where text is at hand on every machine, and that no two prompts may share a start.
Does not know: tokenizers or engines.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader

from kvloom import RequestError
from kvloom.bench.peers.wire import equal_start
from kvloom.bench.tasks import Task

# Modules that every Python has, large ones first; the others follow by name.
_FIRST_MODULES = ("argparse", "_pydecimal", "inspect", "typing", "datetime", "tarfile", "doctest")
# Twice what code takes; the texts of a vocabulary with longer tokens run out with an error.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class RoundPrompts:
    """The prompts of one task in one round.

    Attributes:
        remembered: what an earlier request has computed; empty for a cold task.
        prompts: token ids.
    """

    remembered: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def shared_tokens(self) -> int:
        """How many tokens at the start of every prompt are those that were remembered."""
        return min(equal_start(self.remembered, prompt) for prompt in self.prompts)


PromptTable = Mapping[tuple[str, int], RoundPrompts]


def tokens_needed(tasks: Sequence[Task], rounds: int) -> int:
    """Return how many tokens `cut_prompts` takes at most."""
    return sum(_tokens_of(task, rounds + 1) for task in tasks)


def _tokens_of(task: Task, rounds: int) -> int:
    length = sum(task.prompt_tokens)
    if task.way == "restarted" or not (task.shared_tokens or task.edited_tokens):
        return rounds * length
    fixed = task.shared_tokens or length
    return fixed + rounds * (task.edited_tokens or length - fixed)


def source_text(num_tokens: int) -> str:
    """Return source code of the standard library that gives at least so many tokens."""
    wanted = num_tokens * _CHARACTERS_PER_TOKEN
    parts: list[str] = []
    length = 0
    for _, source in library_modules():
        parts.append(source)
        length += len(source)
        if length >= wanted:
            break
    return "".join(parts)[:wanted]


def cut_prompts(
    tasks: Sequence[Task], rounds: int, tokens: Sequence[int], leading: Sequence[int] = ()
) -> dict[tuple[str, int], RoundPrompts]:
    """Return the prompts by task name and round; round 0 warms up.

    Every prompt is a piece of the text of its own, so that no engine finds it in a cache, except
    for the prefix of a shared task and the text of an edited one, which are the same in all rounds.
    What is sent again after a restart is what was sent before.

    Args:
        tasks: what is measured.
        rounds: rounds that are measured.
        tokens: the tokens of the text.
        leading: tokens that every prompt starts with.

    Raises:
        RequestError: the text is too short.
    """
    place = 0

    def take(count: int) -> tuple[int, ...]:
        nonlocal place
        if place + count > len(tokens):
            raise RequestError(
                f"the standard library's source gives only {len(tokens)} tokens, which is too few "
                f"for {rounds} rounds; lower the rounds.",
                param="rounds",
            )
        place += count
        return tuple(tokens[place - count : place])

    def whole(start: Sequence[int], length: int) -> tuple[int, ...]:
        return (*start, *take(length - len(start)))

    table = {}
    for task in tasks:
        size, remembered = task.prompt_tokens[0], tuple[int, ...]()
        if task.edited_tokens:
            remembered = whole(leading, size - task.edited_tokens + task.replaced_tokens)
        elif task.shared_tokens and task.way != "restarted":
            remembered = whole(leading, task.shared_tokens)
        for number in range(rounds + 1):
            if task.edited_tokens:
                line, where = take(task.edited_tokens), edit_place(task, rounds, number)
                texts = [_edit(remembered, line, where, task.replaced_tokens)]
            else:
                start = () if task.way == "restarted" else remembered
                texts = [whole(start or leading, length) for length in task.prompt_tokens]
            if task.way == "restarted":
                (remembered,) = texts
            table[task.name, number] = RoundPrompts(remembered, tuple(texts))
    return table


def edit_place(task: Task, rounds: int, number: int) -> int:
    """Return where an edited task changes its text: another place each round, around the middle."""
    length = task.prompt_tokens[0]
    step = max(1, length // (4 * (rounds + 1)))
    away = (number + 1) // 2 * step % (length // 4)
    return length // 2 + (away if number % 2 else -away)


def _edit(
    text: tuple[int, ...], line: tuple[int, ...], place: int, replaced: int
) -> tuple[int, ...]:
    """Return the text with a line in the place of some tokens; the first of them differs."""
    old = text[place]
    if line[0] == old:
        line = (
            *(token for token in line if token != old),
            *(token for token in line if token == old),
        )
    return (*text[:place], *line, *text[place + replaced :])


def library_modules() -> Iterator[tuple[str, str]]:
    """Yield name and source text of the standard library's modules, large ones first."""
    rest = sorted(set(sys.stdlib_module_names) - set(_FIRST_MODULES))
    for name in (*_FIRST_MODULES, *rest):
        spec = importlib.util.find_spec(name) if name in sys.stdlib_module_names else None
        if spec is not None and isinstance(spec.loader, InspectLoader):
            yield name, spec.loader.get_source(name) or ""
