"""`kvloom ask`: questions about a file; the file is read once.

Knows: files, and how a question is put behind them.
Does not know: how an answer is streamed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.answer import Answer, cost_table
from kvloom.cli.progress import long_work
from kvloom.cli.settings import EngineOptions, ModelOption, SamplingOptions
from kvloom.cli.terminal import Terminal
from kvloom.errors import RequestError

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM
    from kvloom.outputs import Usage
    from kvloom.params import SamplingParams

MAX_FILE_BYTES = 32 * 2**20
"""More text than any model's context holds; refused before it is split into tokens."""


def ask(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file; - for standard input.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="What to ask.")],
    *,
    model: ModelOption = "default",
    sampling: SamplingOptions,
    options: EngineOptions,
) -> None:
    """Ask questions about a file; all but the first reuse what was read."""
    terminal = Terminal()
    for question in questions:
        if not question.strip():
            raise typer.BadParameter("A question is empty.")
    params = sampling.params()
    text = read_text(file)
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom.engine.llm import LLM

        llm = LLM(model, **options.settings(progress))
    with llm:
        name = "the text" if file == "-" else Path(file).name
        usages = answer_all(llm, name, text, questions, params, terminal)
    terminal.messages.print()
    terminal.messages.print(cost_table(questions, usages))


def answer_all(
    llm: LLM,
    name: str,
    text: str,
    questions: Sequence[str],
    params: SamplingParams,
    terminal: Terminal,
) -> list[Usage]:
    """Stream the answers to several questions about one text and return their receipts.

    Raises:
        RequestError: the text does not fit into the model's context.
    """
    usages = []
    for number, question in enumerate(questions):
        prompt = build_prompt(llm, name, text, question, terminal if number == 0 else None)
        if len(questions) > 1:
            terminal.say(f"{'' if number == 0 else chr(10)}> {question}")
        answer = Answer()
        try:
            answer.stream(llm, prompt, params, terminal)
        except RequestError as error:
            if error.param != "prompt":
                raise
            raise RequestError(f"{name} is too long. {error}", param="file") from error
        terminal.write("\n")
        assert answer.usage is not None
        usages.append(answer.usage)
    return usages


def build_prompt(
    llm: LLM, name: str, text: str, question: str, terminal: Terminal | None = None
) -> list[int]:
    """Return the tokens of a question behind a text, so that questions share their beginning.

    A model without a chat template gets plain text to complete.

    Args:
        llm: the model.
        name: what the text is called.
        text: the text.
        question: the question.
        terminal: is told if the model has no chat template.
    """
    content = f"Here is {name}:\n\n{text.rstrip()}\n\n{question}"
    try:
        return llm.tokenizer.chat_tokens([{"role": "user", "content": content}])
    except RequestError as error:
        if error.param != "messages":
            raise
        if terminal is not None:
            terminal.note(f"The question is put as plain text: {error}")
        return llm.tokenizer.encode(f"{content}\n\nAnswer:")


def read_text(file: str) -> str:
    """Return the text of a file, or of standard input for `-`.

    Raises:
        RequestError: it cannot be read, is empty, too large or no text.
    """
    try:
        if file == "-":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                content = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{file!r} cannot be read: {reason}.", param="file") from error
    return decode_text(file, content)


def decode_text(file: str, content: bytes) -> str:
    """Return the bytes of a file as text.

    Raises:
        RequestError: they are none, too many or no text.
    """
    name = "Standard input" if file == "-" else file
    if len(content) > MAX_FILE_BYTES:
        raise RequestError(
            f"{name} is larger than {MAX_FILE_BYTES:,} bytes, more than a model's context holds; "
            "ask about a part of it.",
            param="file",
        )
    if b"\0" in content:
        raise RequestError(f"{name} is a binary file; give a text file in UTF-8.", param="file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is no UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            "convert it to UTF-8 first.",
            param="file",
        ) from error
    if not text.strip():
        raise RequestError(f"{name} is empty; there is nothing to ask about.", param="file")
    return text
