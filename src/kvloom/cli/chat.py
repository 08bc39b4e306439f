"""`kvloom chat`: a conversation, from a terminal or a pipe.

Knows: lines, commands and the messages so far.
Does not know: how an answer is streamed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.answer import Answer, summary
from kvloom.cli.progress import long_work
from kvloom.cli.settings import EngineOptions, ModelOption, SamplingOptions
from kvloom.cli.terminal import Terminal
from kvloom.errors import KvloomError, RequestError

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM
    from kvloom.params import SamplingParams

COMMANDS = """\
/reset          forget the conversation
/system TEXT    set the system message and begin again; without TEXT, show it
/help           this list
/quit           end (so does Ctrl-D); Ctrl-C ends an answer"""


def chat(
    *,
    model: ModelOption = "default",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    sampling: SamplingOptions,
    options: EngineOptions,
) -> None:
    """Talk with a model; every line is a message, also from a pipe."""
    terminal = Terminal()
    params = sampling.params()
    interactive = sys.stdin.isatty()
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom.engine.llm import LLM

        llm = LLM(model, **options.settings(progress))
    with llm:
        # Before the first message is typed, so that a model that cannot chat says so at once.
        llm.tokenizer.chat_tokens([{"role": "user", "content": "?"}])
        conversation = Conversation(llm, params, terminal, system)
        if interactive:
            terminal.note(f"{llm.model_path.name} · /help lists the commands")
        for line in read_lines(terminal, interactive=interactive):
            if line.startswith("/"):
                if not conversation.obey(line):
                    break
                continue
            try:
                conversation.ask(line)
            except KvloomError as error:
                if not interactive:
                    raise
                terminal.error(f"{error} /reset forgets the conversation.")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                terminal.write("\n")
                terminal.note("cancelled")


class Conversation:
    """The messages so far, and who answers them.

    Attributes:
        messages: as the chat template takes them.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, terminal: Terminal, system: str | None = None
    ) -> None:
        self._llm = llm
        self._params = params
        self._terminal = terminal
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        self.messages: list[dict[str, str]] = system

    def ask(self, content: str) -> None:
        """Stream the answer to a message; one that was cancelled stays as far as it came.

        Raises:
            RequestError: the conversation is too long; the message is taken back.
        """
        self.messages.append({"role": "user", "content": content})
        answer = Answer()
        try:
            prompt = self._llm.tokenizer.chat_tokens(self.messages)
            answer.stream(self._llm, prompt, self._params, self._terminal)
        finally:
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            elif answer.usage is None:
                self.messages.pop()
        self._terminal.write("\n")
        assert answer.usage is not None
        self._terminal.note(summary(answer.usage))

    def obey(self, line: str) -> bool:
        """Carry out a command; False if it is the last one."""
        command, _, text = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._terminal.say(COMMANDS)
            case "/reset":
                self.reset()
                self._terminal.note("The conversation is forgotten.")
            case "/system":
                self._set_system(text.strip())
            case _:
                self._terminal.error(
                    f"{command} is no command; there are /reset, /system, /help and /quit. "
                    "Begin a message that starts with / with a space."
                )
        return True

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
            self.reset()
            self._terminal.note("The system message is set; the conversation begins again.")
        else:
            self._terminal.note(self._system or "There is no system message.")


def read_lines(terminal: Terminal, *, interactive: bool) -> Iterator[str]:
    """Yield the lines of standard input that are not empty.

    Raises:
        RequestError: a line is no UTF-8 text.
    """
    if interactive:
        # Importing it gives `input` line editing and a history.
        import readline  # noqa: F401
    while True:
        try:
            line = _read_line(terminal, interactive=interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            terminal.messages.print()
            terminal.note("/quit or Ctrl-D ends")
            continue
        except UnicodeDecodeError as error:
            raise RequestError(f"Standard input is no UTF-8 text: {error}.") from error
        if line is None:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _read_line(terminal: Terminal, *, interactive: bool) -> str | None:
    """Return the next line; None at the end of the input."""
    if interactive and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            terminal.messages.print()
            return None
    if interactive:
        terminal.messages.print("> ", end="")
    return sys.stdin.readline() or None
