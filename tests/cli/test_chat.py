"""`kvloom chat`: conversations from a pipe and from a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import KVLOOM, SMALL, Invoke, assert_error

REUSED = re.compile(r"computed (\d+) tokens? · reused (\d+)")


def answers_of_transformers(model: str, lines: list[str], num_tokens: int) -> list[str]:
    """What plain transformers answers in one conversation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    messages: list[dict[str, str]] = []
    answers = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = network.generate(**ids, max_new_tokens=num_tokens, do_sample=False)
        new = output[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def talk(invoke: Invoke, model: str, text: str | bytes, *options: str) -> tuple[str, str]:
    result = invoke("chat", "-m", model, "--max-tokens", "6", *SMALL, *options, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_pipe_holds_a_conversation(invoke: Invoke, tiny_model: str) -> None:
    lines = ["Hello, who are you?", "And what is right?"]
    stdout, stderr = talk(invoke, tiny_model, "\n".join(lines))
    expected = answers_of_transformers(tiny_model, lines, 6)
    assert stdout == "".join(f"{answer}\n" for answer in expected)
    costs = [(int(a), int(b)) for a, b in REUSED.findall(stderr)]
    assert len(costs) == 2
    assert costs[0][1] == 0
    assert costs[1][1] >= costs[0][0]


def test_reset_forgets(invoke: Invoke, tiny_model: str) -> None:
    stdout, _ = talk(invoke, tiny_model, "Hello\n\nSecond\n/reset\nHello\n")
    first, second = answers_of_transformers(tiny_model, ["Hello", "Second"], 6)
    assert stdout == f"{first}\n{second}\n{first}\n"


def test_a_system_message_changes_the_prompt(invoke: Invoke, tiny_model: str) -> None:
    _, plain = talk(invoke, tiny_model, "Hello\n", "--no-store")
    said, by_option = talk(
        invoke, tiny_model, "Hello\n/system\n", "--system", "Be brief.", "--no-store"
    )
    typed, by_command = talk(invoke, tiny_model, "/system Be brief.\nHello\n", "--no-store")
    assert said == typed
    computed = [int(REUSED.search(text)[1]) for text in (plain, by_option, by_command)]  # type: ignore[index]
    assert computed[0] < computed[1] == computed[2]
    assert "Be brief." in by_option


def test_quit_ends_and_help_and_unknown_commands_do_not(invoke: Invoke, tiny_model: str) -> None:
    stdout, stderr = talk(invoke, tiny_model, "/help\n/nonsense\n /etc is a path\n/quit\nHello\n")
    assert len(REUSED.findall(stderr)) == 1
    assert stdout.count("\n") >= 1
    assert "/nonsense is no command" in stderr
    assert "/system TEXT" in stderr


def test_no_input_is_no_error(invoke: Invoke, tiny_model: str) -> None:
    assert talk(invoke, tiny_model, "")[0] == ""


def test_a_model_without_chat_template_says_so_at_once(invoke: Invoke, plain_model: str) -> None:
    assert_error(invoke("chat", "-m", plain_model, *SMALL, text="Hello\n"), 1, "no chat template")


def test_a_pipe_ends_at_an_error(invoke: Invoke, tiny_model: str) -> None:
    arguments = ("chat", "-m", tiny_model, "--max-tokens", "2", "--max-model-len", "40", *SMALL)
    result = invoke(*arguments, text="Hi\n" + "long " * 100 + "\nHi\n")
    assert result.exit_code == 1
    assert len(REUSED.findall(result.stderr)) == 1
    assert "at most 39 fit" in result.stderr


def test_a_line_that_is_no_text_is_an_error(invoke: Invoke, tiny_model: str) -> None:
    result = invoke("chat", "-m", tiny_model, *SMALL, text=b"\xff\xfe\n")
    assert_error(result, 1, "UTF-8")


class TerminalSession:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.screen, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*KVLOOM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "INPUTRC": os.devnull},
            preexec_fn=_take_terminal,  # noqa: PLW1509 - runs one system call, no Python lock
        )
        os.close(slave)
        self.seen = self.fresh = ""

    @property
    def tail(self) -> str:
        return self.seen[-500:]

    def read_until(self, pattern: str) -> None:
        """Read until the pattern occurs in what comes from now on."""
        end = time.monotonic() + 60
        self.fresh = ""
        while not re.search(pattern, self.fresh):
            assert self._read(end - time.monotonic()), f"{pattern!r} did not come: {self.tail}"

    def _read(self, seconds: float) -> bool:
        """Add to `fresh` what comes next; False if nothing came in time."""
        if not select.select([self.screen], [], [], max(seconds, 0))[0]:
            return False
        piece = os.read(self.screen, 65536).decode(errors="replace")
        self.fresh += piece
        self.seen += piece
        return True

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until the pattern occurs.

        CPython misses a Ctrl-C that comes after a prompt was printed and before it waits for keys.
        """
        end = time.monotonic() + 60
        self.fresh = ""
        while not re.search(pattern, self.fresh):
            assert time.monotonic() < end, f"{pattern!r} did not come in time: {self.tail}"
            self.type(key)
            while self._read(0.5):
                pass


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def on_terminal(*arguments: str) -> Iterator[TerminalSession]:
    session = TerminalSession(*arguments)
    try:
        yield session
    finally:
        session.process.kill()
        session.process.wait()
        os.close(session.screen)


@pytest.mark.timeout(300)
def test_on_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_program(tiny_model: str) -> None:
    arguments = ("chat", "-m", tiny_model, "--max-tokens", "4000", *SMALL)
    with on_terminal(*arguments) as session:
        session.read_until("/help lists[^>]*> ")
        session.type("Hello there\n")
        session.read_until(r"(\r\n){5}")  # the random model answers with empty lines
        session.press_until("\x03", "cancelled")
        session.press_until("\x03", "Ctrl-D ends")
        session.type("/reset\n")
        session.read_until("forgotten[^>]*> ")
        session.type("\x04")
        assert session.process.wait(timeout=60) == 0
    assert "Traceback" not in session.seen


@pytest.mark.timeout(300)
def test_on_a_terminal_an_error_does_not_end_the_program(tiny_model: str) -> None:
    arguments = ("chat", "-m", tiny_model, "--max-tokens", "2", "--max-model-len", "40", *SMALL)
    with on_terminal(*arguments) as session:
        session.read_until("/help lists[^>]*> ")
        session.type("long " * 60 + "\n")
        session.read_until("at most 39 fit[^>]*> ")
        session.type("Hi\n")
        session.read_until("reused[^>]*> ")
        session.type("/quit\n")
        assert session.process.wait(timeout=60) == 0
