"""`kvloom demo`: a file is read, asked about, changed in one line, and asked about again.

Knows: the file, the change, the questions, and how the answers' costs compare.
Does not know: how an answer is streamed, or how an edit is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.table import Table

from kvloom.cli.answer import Answer, as_seconds
from kvloom.cli.progress import long_work
from kvloom.cli.settings import EngineOptions, ModelOption
from kvloom.cli.terminal import Terminal
from kvloom.errors import RequestError

if TYPE_CHECKING:
    from kvloom.engine.document import Document
    from kvloom.engine.llm import LLM
    from kvloom.outputs import EditReceipt, Fidelity, Usage
    from kvloom.params import SamplingParams

MODULE = "timeit"
"""About 3,400 tokens, and a small model understands it well enough to answer rightly."""
SUMMARY = "What does this module measure? Answer in one sentence."
QUESTION = "Which class does this module define? Answer in one sentence."
OLD_LINE, NEW_LINE = "default_repeat = 5", "default_repeat = 12"
MAX_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Step:
    """One answer and what it cost.

    Attributes:
        name: what happened before it.
        usage: the answer's receipt.
        edit: the receipt of the edit before it, if there was one.
    """

    name: str
    usage: Usage
    edit: EditReceipt | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds from the question, or from the edit before it, to the first token."""
        edit = 0.0 if self.edit is None else self.edit.seconds
        return edit + (self.usage.time_to_first_token_s or 0.0)

    @property
    def computed(self) -> int:
        """Rows run for the prompt and the edit."""
        return self.usage.computed_tokens + (0 if self.edit is None else self.edit.recomputed)


def demo(*, model: ModelOption = "default", options: EngineOptions) -> None:
    """Read a module of Python's standard library, change a line of it, and ask in between."""
    terminal = Terminal()
    text = module_source(MODULE)
    with TemporaryDirectory(prefix="kvloom-demo-") as folder:
        with _started(model, options, Path(folder), terminal, "Starting") as llm:
            steps = before_the_restart(llm, text, terminal)
        with _started(model, options, Path(folder), terminal, "Starting again") as llm:
            steps.append(after_the_restart(llm, text, terminal))
    terminal.messages.print()
    terminal.messages.print(cost_table(steps))
    terminal.say(f"\n{comparison(steps)}")


def before_the_restart(llm: LLM, text: str, terminal: Terminal) -> list[Step]:
    """Ask about a text, change it at two fidelities, and ask again.

    Raises:
        RequestError: the text does not fit into the model's context.
    """
    prompt = Prompt.of(llm, text, QUESTION)
    num_tokens = len(llm.tokenizer.encode(text))
    terminal.say(
        f"{llm.model_path.name} reads {MODULE}.py of Python's standard library "
        f"({len(text):,} characters, {num_tokens:,} tokens).\n"
    )
    document = llm.document("")
    first = Prompt.of(llm, text, SUMMARY)
    steps = [Step("the file is read", _asked(llm, document, first.text, SUMMARY, terminal))]
    document = llm.document(llm.tokenizer.encode(prompt.beginning, add_special_tokens=False))
    steps.append(Step("asked again", _asked(llm, document, prompt.end, QUESTION, terminal)))
    place = prompt.beginning.index(OLD_LINE)
    changes: tuple[tuple[Fidelity, str], ...] = (
        ("shifted", "a line changed"),
        ("exact", "the same, exactly"),
    )
    for fidelity, name in changes:
        changed = document.fork()
        receipt = changed.edit(place, place + len(OLD_LINE), NEW_LINE, fidelity=fidelity)
        terminal.say(f"\n{OLD_LINE} becomes {NEW_LINE} ({fidelity}).")
        usage = _asked(llm, changed, prompt.end, QUESTION, terminal)
        steps.append(Step(name, usage, receipt))
    return steps


def after_the_restart(llm: LLM, text: str, terminal: Terminal) -> Step:
    """Ask about the changed text in a process that has not read it."""
    prompt = Prompt.of(llm, text.replace(OLD_LINE, NEW_LINE), QUESTION)
    terminal.say("\nThe engine was closed and started again.")
    usage = _asked(llm, llm.document(""), prompt.text, QUESTION, terminal)
    return Step("after a restart", usage)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question behind a text, cut where the text ends.

    Attributes:
        beginning: up to the end of the text.
        end: the question, and what asks for the answer.
    """

    beginning: str
    end: str

    @property
    def text(self) -> str:
        """The whole."""
        return self.beginning + self.end

    @classmethod
    def of(cls, llm: LLM, text: str, question: str) -> Prompt:
        """Return the prompt; a model without a chat template gets plain text to complete."""
        text = text.rstrip()
        content = f"Here is {MODULE}.py:\n\n{text}\n\n{question}"
        try:
            whole = llm.tokenizer.render_chat([{"role": "user", "content": content}])
        except RequestError as error:
            if error.param != "messages":
                raise
            whole = f"{content}\n\nAnswer:"
        place = whole.index(text) + len(text)
        return cls(whole[:place], whole[place:])


def module_source(name: str) -> str:
    """Return the source of a module of the standard library, without importing it.

    Raises:
        RequestError: this Python comes without the source.
    """
    spec = find_spec(name)
    source = getattr(spec.loader, "get_source", lambda _: None)(name) if spec else None
    if not source:
        raise RequestError(
            f"This Python comes without the source of {name}; try `kvloom ask FILE QUESTION`."
        )
    return str(source)


def cost_table(steps: Sequence[Step]) -> Table:
    """Return a table of what each answer cost, and of the KV it was read from."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("computed", "first token"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KV of the prompt", justify="right")
    for step in steps:
        states = step.usage.provenance.tokens
        kept = " · ".join(f"{count:,} {state}" for state, count in states.items())
        table.add_row(step.name, f"{step.computed:,}", as_seconds(step.first_token_s), kept)
    return table


def comparison(steps: Sequence[Step]) -> str:
    """Return a sentence on what the edit cost beside computing it exactly."""
    changed, exact, restarted = steps[-3:]
    return (
        f"After the edit the first token came after {as_seconds(changed.first_token_s)} with "
        f"{changed.computed:,} rows run, exactly after {as_seconds(exact.first_token_s)} with "
        f"{exact.computed:,}, and after a restart in {as_seconds(restarted.first_token_s)} with "
        f"{restarted.computed:,}."
    )


def _started(
    model: str, options: EngineOptions, folder: Path, terminal: Terminal, description: str
) -> LLM:
    with long_work(terminal.messages, description, "Preparing the model") as progress:
        from kvloom.engine.llm import LLM
        from kvloom.engine.shelving import StoreSettings

        settings = options.settings(progress)
        settings["store"] = StoreSettings(folder=folder)
        settings["repair_when_idle"] = False  # it shows what edits cost and leave behind
        return LLM(model, **settings)


def _asked(llm: LLM, document: Document, text: str, question: str, terminal: Terminal) -> Usage:
    """Ask, write the answer, and return its receipt."""
    terminal.say(f"> {question}")
    answer = Answer()
    num_tokens = len(document.with_question(text))
    try:
        answer.follow(document.stream(text, _params()), llm, num_tokens, terminal)
    except RequestError as error:
        if error.param != "prompt":
            raise
        raise RequestError(f"{MODULE}.py is too long. {error}", param="file") from error
    terminal.write("\n")
    assert answer.usage is not None
    return answer.usage


def _params() -> SamplingParams:
    from kvloom.params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
