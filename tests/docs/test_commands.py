"""Every command that the documentation shows exists, takes its options and sends valid bodies."""

from __future__ import annotations

import json
import re
from itertools import dropwhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer

from kvloom.cli import make_app
from kvloom.serve.infill_body import InfillBody
from kvloom.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.docs.pages import PAGES, ROOT, command_lines, inline_commands, name_of

BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/infill": InfillBody,
}
VARIABLE = re.compile(r"[A-Z_]+=.*")


def shown_commands(page: Path, program: str) -> list[list[str]]:
    """Return the commands of a page that call a program, without environment variables."""
    lines = [words for _, words in command_lines(page)]
    if program == "kvloom":
        lines += inline_commands(page)
    found = []
    for words in lines:
        call = list(dropwhile(VARIABLE.fullmatch, words))
        if call and call[0] == program:
            found.append(call)
    return found


def check_kvloom(words: list[str]) -> str | None:
    """Return what is wrong with a call of kvloom; None if nothing is."""
    command: Any = typer.main.get_command(make_app())
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {"-h", "--help"}
    for parameter in command.params:
        options.update(parameter.opts, parameter.secondary_opts)
    for word in rest:
        if word.startswith("-") and word != "-" and word.partition("=")[0] not in options:
            return f"it has no option {word}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_kvloom_commands_exist(page: Path) -> None:
    wrong = {
        " ".join(words): problem
        for words in shown_commands(page, "kvloom")
        if (problem := check_kvloom(words)) is not None
    }
    assert not wrong


def test_wrong_commands_are_noticed() -> None:
    assert check_kvloom(["kvloom", "serve", "--port", "1"]) is None
    assert check_kvloom(["kvloom", "models", "list"]) is None
    assert check_kvloom(["kvloom", "sing"]) == "there is no command sing"
    assert check_kvloom(["kvloom", "models", "eat"]) == "there is no command eat"
    assert check_kvloom(["kvloom", "serve", "--loudly"]) == "it has no option --loudly"


def test_every_command_is_shown_somewhere() -> None:
    app: Any = typer.main.get_command(make_app())
    shown = {words[1] for page in PAGES for words in shown_commands(page, "kvloom")}
    assert app.commands.keys() - shown == set()


def test_curl_sends_bodies_that_the_server_takes() -> None:
    checked = 0
    for page in PAGES:
        for words in shown_commands(page, "curl"):
            if "-d" not in words:
                continue
            url = next(word for word in words if word.startswith("http"))
            BODIES[urlsplit(url).path].model_validate(json.loads(words[words.index("-d") + 1]))
            checked += 1
    assert checked > 0


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {words[1] for page in PAGES for words in shown_commands(page, "make")}
    assert shown
    assert shown <= targets


def test_environment_variables_exist() -> None:
    names = re.compile(r"\bKVLOOM_[A-Z_]+\b")
    known = set()
    for file in (ROOT / "src").rglob("*.py"):
        known |= set(names.findall(file.read_text(encoding="utf-8")))
    shown = {name for page in PAGES for name in names.findall(page.read_text(encoding="utf-8"))}
    assert shown
    assert shown <= known
