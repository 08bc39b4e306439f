"""Settings of the server."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvloom.errors import RequestError
from kvloom.serve.config import ServerConfig


def test_stays_on_this_machine_unless_told() -> None:
    assert ServerConfig().host == "127.0.0.1"
    assert ServerConfig().api_keys == ()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_body_bytes", 0),
        ("max_documents", -1),
        ("served_model_name", " "),
        ("grace_s", -1.0),
        ("grace_s", math.nan),
        ("stall_timeout_s", 0.0),
        ("stall_timeout_s", math.inf),
        ("api_keys", ("",)),
        ("api_keys", ("good", "with space")),
        ("api_keys", ("ключ",)),
        ("api_keys", ("line\n",)),
    ],
)
def test_values_out_of_range_are_named(param: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ServerConfig(**{param: value})
    assert caught.value.param == param


def test_keys_are_not_printed() -> None:
    assert "sk-hidden" not in repr(ServerConfig(api_keys=("sk-hidden",)))
