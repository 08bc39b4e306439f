"""The generated parts of the documentation say what the server really does."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tools.docs_hooks import MARKER, generated, on_page_markdown

from kvloom.outputs import EngineStats
from kvloom.serve.document_bodies import CreateBody, Edit, PatchBody
from kvloom.serve.infill_body import InfillBody
from kvloom.serve.metrics import Metrics
from kvloom.serve.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    KvloomOptions,
    TokenizeBody,
)
from tests.docs.pages import PAGES, ROOT

MESSAGE = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"messages": [MESSAGE]}
COMPLETION: dict[str, Any] = {"prompt": "Hello"}
INFILL: dict[str, Any] = {"input_prefix": "a", "input_suffix": "b"}
TOKENIZE: dict[str, Any] = {"prompt": "Hello"}
REFUSALS = [
    ("refused-both", CompletionBody, COMPLETION),
    ("refused-both", ChatBody, CHAT),
    ("refused-completion", CompletionBody, COMPLETION),
    ("refused-chat", ChatBody, CHAT),
    ("refused-infill", InfillBody, INFILL),
    ("refused-tokenize", TokenizeBody, TOKENIZE),
]
ACCEPTED = [
    (("fields-shared", "fields-completion"), CompletionBody),
    (("fields-shared", "fields-chat"), ChatBody),
    (("fields-tokenize",), TokenizeBody),
    (("fields-detokenize",), DetokenizeBody),
    (("fields-create",), CreateBody),
    (("fields-edit",), Edit),
    (("fields-infill",), InfillBody),
    (("fields-kvloom",), KvloomOptions),
    (("fields-patch",), PatchBody),
]


def rows_of(name: str) -> dict[str, str]:
    """Return a generated table as first cell, in backticks, to second cell."""
    return dict(re.findall(r"^\| `([\w.{}:/-]+)`[^|]*\| (.*) \|$", generated(name), re.MULTILINE))


@pytest.mark.parametrize(("table", "body", "base"), REFUSALS)
def test_refused_fields_pass_only_as_written(
    table: str, body: type[BaseModel], base: dict[str, Any]
) -> None:
    rows = rows_of(table)
    assert rows
    for name, cell in rows.items():
        for value in re.findall(r"`([^`]+)`", cell):
            body.model_validate(base | {name: json.loads(value)})
        with pytest.raises(ValidationError, match=name):
            body.model_validate(base | {name: ["something", "wanted"]})


@pytest.mark.parametrize(("tables", "body"), ACCEPTED)
def test_tables_name_every_accepted_field(tables: tuple[str, ...], body: type[BaseModel]) -> None:
    shown = {name for table in tables for name in rows_of(table)}
    assert shown == set(body.model_json_schema()["properties"])


def test_all_routes_of_the_server_are_listed() -> None:
    from kvloom.serve import document_routes
    from kvloom.serve.routes import router

    text = generated("routes")
    for route in [*router.routes, *document_routes.router.routes]:
        assert f"`{route.path}`" in text


def test_all_error_codes_are_listed() -> None:
    page = (ROOT / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
    codes = set()
    for file in (ROOT / "src" / "kvloom" / "serve").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        codes |= set(re.findall(r'code="(\w+)"', text))
        codes |= set(re.findall(r'\b4\d\d: "(\w+)"', text))
    assert len(codes) > 5
    assert {code for code in codes if f"`{code}`" not in page} == set()


def test_all_metrics_are_listed() -> None:
    body, _ = Metrics().exposition("", EngineStats())
    served = {
        name.removesuffix("_total") if kind == "counter" else name
        for name, kind in re.findall(r"^# TYPE (kvloom_\w+) (\w+)$", body.decode(), re.MULTILINE)
        if not name.endswith("_created")
    }
    shown = set(re.findall(r"`(kvloom_\w+)`", generated("metrics")))
    assert served == shown


def test_every_marker_is_known_and_filled() -> None:
    markers = {name for page in PAGES for name in MARKER.findall(page.read_text(encoding="utf-8"))}
    assert len(markers) > 10
    for name in markers:
        assert on_page_markdown(f"a\n\n<!-- generated: {name} -->\n\nb") == (
            f"a\n\n{generated(name)}\n\nb"
        )


def test_unknown_markers_fail() -> None:
    with pytest.raises(KeyError, match="nothing"):
        on_page_markdown("<!-- generated: nothing -->")
