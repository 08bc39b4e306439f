"""Options: what they are turned into, and that their defaults are the engine's own."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer

from kvloom.cli.settings import (
    BatchOptions,
    EngineOptions,
    SamplingOptions,
    ServerOptions,
    size,
)
from kvloom.engine.assembly import Settings, engine_config
from kvloom.errors import RequestError
from kvloom.serve.config import ServerConfig


def silent(description: str, done: int, total: int) -> None:
    return None


def test_every_setting_of_the_engine_has_an_option() -> None:
    given = EngineOptions().settings(silent) | BatchOptions().settings()
    assert set(given) == set(Settings.__annotations__)


def test_defaults_are_those_of_the_engine() -> None:
    given = EngineOptions().settings(silent) | BatchOptions().settings()
    assert engine_config(given) == engine_config({})


def test_defaults_are_those_of_the_server() -> None:
    assert ServerOptions().config("tiny") == ServerConfig(served_model_name="tiny")


def test_server_options_are_passed_on() -> None:
    options = ServerOptions(
        host="::1",
        port=9,
        api_key=["a", "b"],
        served_model_name="x",
        max_body=7,
        max_documents=3,
        grace=1.5,
    )
    assert options.config("tiny") == ServerConfig(
        host="::1",
        port=9,
        api_keys=("a", "b"),
        served_model_name="x",
        max_body_bytes=7,
        max_documents=3,
        grace_s=1.5,
    )


def test_sampling_options_are_passed_on() -> None:
    options = SamplingOptions(
        max_tokens=5, temperature=0.5, top_p=0.25, repetition_penalty=1.5, seed=3
    )
    params = options.params()
    for field in fields(SamplingOptions):
        assert getattr(params, field.name) == getattr(options, field.name)


def test_a_sampling_option_out_of_range_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplingOptions(top_p=0).params()


@pytest.mark.parametrize(("text", "num_bytes"), [("2GiB", 2**31), ("10kb", 10_000), (77, 77)])
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "garbage", "-1GiB", "0", "nan", "1e9", "2 GB extra"])
def test_a_wrong_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="size"):
        size(text)
