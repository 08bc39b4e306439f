"""Credentials are found in text; what attended to them is known."""

from __future__ import annotations

import random
import socket
import string
from pathlib import Path

import pytest

from kvloom.store.key import context_of
from kvloom.store.secrets import SecretContexts, SecretScanner
from tests.store.chunks import ROOT


@pytest.fixture(scope="module")
def scanner():
    return SecretScanner()


def invented(alphabet: str, length: int, seed: int) -> str:
    """Something that looks like a credential and is none."""
    return "".join(random.Random(seed).choices(alphabet, k=length))


WORD = string.ascii_letters + string.digits
CREDENTIALS = {
    "aws": "AKIA" + invented(string.ascii_uppercase + string.digits, 16, 1),
    "github": "ghp_" + invented(WORD, 36, 2),
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "basic auth": f"https://user:{invented(WORD, 12, 3)}@example.org/x",
    "password": 'password = "Summer2024!"',
    "unquoted": "DB_PASSWORD=hunter2hunter2",
    "yaml": "api_key: " + invented(WORD, 20, 4),
    "shell": "export AWS_SECRET_ACCESS_KEY=" + invented(WORD, 40, 5),
    "base64": f'x = "{invented(WORD, 50, 6)}"',
    "hex": f"y = '{invented('0123456789abcdef', 40, 7)}'",
    "slack": "xoxb-" + invented(string.digits, 12, 8) + "-" + invented(WORD, 24, 9),
}
ORDINARY = [
    "",
    "The password must be at least eight characters long, and is never shown.",
    "def set_password(self, password: str) -> None:\n    self.password = hash(password)",
    "token = tokenizer.encode(text)\nnum_tokens = 12345678\nmax_tokens: int = 4096",
    "password = os.environ['PASSWORD']\nsecret = get_secret(name)",
    'api_key = "${API_KEY}"\npassword = "<password>"',
    "id = '123e4567-e89b-12d3-a456-426614174000'",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials_are_found_wherever_they_stand(scanner, name):
    text = CREDENTIALS[name]
    assert scanner.scan(text)
    assert scanner.scan(f"Some words before.\n  {text}\nand behind")
    assert text not in "".join(scanner.scan(text))


@pytest.mark.parametrize("text", ORDINARY, ids=lambda text: text[:20])
def test_ordinary_text_may_be_kept(scanner, text):
    assert scanner.scan(text) == ()


def test_this_file_may_be_kept_for_the_most_part(scanner):
    """Prose and code of this project are not full of credentials."""
    import kvloom.store.key as module

    assert scanner.scan(Path(module.__file__).read_text(encoding="utf-8")) == ()


def test_a_long_line_is_searched_to_its_end(scanner):
    for before in range(1900, 2100, 7):
        assert scanner.scan("a " * (before // 2) + CREDENTIALS["github"])


def test_the_network_is_not_asked(scanner, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for text in CREDENTIALS.values():
        scanner.scan(text)


def test_contexts_behind_a_secret_are_known_token_by_token():
    contexts = SecretContexts()
    origin = ROOT.extend(range(100))
    contexts.add(origin, list(range(200, 300)))
    assert None not in contexts
    assert context_of(origin) not in contexts
    assert context_of(ROOT) not in contexts
    for stop in range(201, 301):
        assert context_of(origin.extend(range(200, stop))) in contexts
    assert context_of(origin.extend([999])) not in contexts
    assert context_of(ROOT.extend(range(200, 300))) not in contexts
