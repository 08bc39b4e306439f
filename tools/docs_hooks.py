"""Fills the parts of the documentation that the code can say itself, while mkdocs builds it.

Knows: the markers `<!-- generated: NAME -->`, and where in kvloom each table comes from.
Does not know: the text around the markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import getdoc
from typing import Any

MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)

MEANINGS = {
    "add_special_tokens": "let the tokenizer add its special tokens; true if left out",
    "best_of": "accepted where it equals `n`",
    "append": "text that comes behind the document; its tokens do not merge with those before",
    "cache_prompt": "accepted, changes nothing: equal prefixes are found anyway",
    "character": "column from zero, in UTF-16 units",
    "content": "text, or a list of parts of type `text`, `document` and `chunk`",
    "document": "id of a document that the prompts go on from",
    "documents": 'ids of several documents, and chunks as `{"text": ...}`, one behind the other',
    "document_id": "id of a document",
    "edits": "a list of edits, see below",
    "end": "character behind the last",
    "fidelity": "`exact`, `repaired` or `shifted`",
    "filename": "name of the text",
    "input_extra": 'a list of `{"filename": ..., "text": ...}`, the most useful last',
    "input_prefix": "text before the gap",
    "input_suffix": "text behind the gap",
    "kvloom": "see below; asks for the receipt",
    "line": "from zero",
    "n_indent": "accepted, changes nothing",
    "n_predict": "tokens generated at most; −1 for no limit, 0 to read the prompt only",
    "range": "`start` and `end`, each with `line` and `character`, as editors send them",
    "rangeLength": "accepted, changes nothing: the protocol calls it out of date",
    "repeat_penalty": "as `repetition_penalty`",
    "response_fields": "names of the fields that are wanted; `a/b` takes `b` out of `a`",
    "return_tokens": "give the token ids as well",
    "samplers": "accepted, changes nothing",
    "selector": "how repaired tokens are chosen: `blend`, `first` or `random`",
    "planner": "how repaired tokens are chosen: `blend` if left out, `craft`, `first`, `random`, "
    "`none`; only with `repaired`",
    "share": "of the old tokens behind the edit, or of those of a joined part, that is computed "
    "again where `repaired`; 0.15 if left out",
    "start": "first character replaced",
    "suffix": "text behind the gap that is to be filled; see below",
    "t_max_predict_ms": "accepted, changes nothing",
    "t_max_prompt_ms": "accepted, changes nothing",
    "text": "text",
    "version": "the version that the client knows; another one is a 409",
    "cache_salt": "a text; KV is reused only among requests that send the same, see [keys](#keys)",
    "echo": "put the prompt before each completion; with `logprobs` its tokens are scored as well",
    "include_usage": "end the stream with a chunk that holds `usage`",
    "logprobs": "report log-probabilities",
    "max_completion_tokens": "another name of `max_tokens`",
    "messages": "the conversation",
    "metadata": "a label; accepted, changes nothing",
    "model": "the served model's name; may be left out",
    "name": "a label; in a message, handed to the chat template",
    "prompt": "text, a list of texts, token ids, or a list of lists of token ids; may be left out "
    "with a document; in `/infill`, the beginning of what fills the gap",
    "prompt_cache_key": "a label; accepted, changes nothing: equal prefixes are found anyway",
    "return_token_strs": "give each token's text as well",
    "role": "`system`, `developer` (read as `system`), `user` or `assistant`",
    "safety_identifier": "a label; accepted, changes nothing",
    "stream": "send server-sent events",
    "stream_options": "see below; only with `stream`",
    "tokens": "token ids",
    "top_logprobs": "alternatives per token; needs `logprobs`",
    "user": "a label; accepted, changes nothing",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page; called by mkdocs."""
    return MARKER.sub(lambda match: generated(match[1]), markdown)


def generated(name: str) -> str:
    """Return the Markdown behind a marker.

    Raises:
        KeyError: nothing of this name is generated.
    """
    from kvloom.serve import document_bodies, infill_body, schemas, unsupported

    makers: Mapping[str, Callable[[], str]] = {
        "command-line": command_line,
        "fields-chat": lambda: fields(schemas.ChatBody, skip=schemas.SamplingBody),
        "fields-chat-message": lambda: fields(schemas.ChatMessage),
        "fields-completion": lambda: fields(schemas.CompletionBody, skip=schemas.SamplingBody),
        "fields-create": lambda: fields(document_bodies.CreateBody),
        "fields-edit": lambda: fields(document_bodies.Edit),
        "fields-infill": lambda: fields(infill_body.InfillBody),
        "fields-kvloom": lambda: fields(schemas.KvloomOptions),
        "fields-patch": lambda: fields(document_bodies.PatchBody),
        "fields-detokenize": lambda: fields(schemas.DetokenizeBody),
        "fields-shared": lambda: fields(schemas.SamplingBody),
        "fields-stream-options": lambda: fields(schemas.StreamOptions),
        "fields-tokenize": lambda: fields(schemas.TokenizeBody),
        "metrics": metrics,
        "refused-both": lambda: refused(unsupported.BOTH),
        "refused-chat": lambda: refused(unsupported.CHAT, without=unsupported.BOTH),
        "refused-completion": lambda: refused(unsupported.COMPLETION, without=unsupported.BOTH),
        "refused-infill": lambda: refused(unsupported.INFILL),
        "refused-message": lambda: refused(unsupported.MESSAGE),
        "refused-stream-options": lambda: refused(unsupported.STREAM_OPTIONS),
        "refused-tokenize": lambda: refused(unsupported.TOKENIZE),
        "routes": routes,
    }
    return makers[name]()


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in cells)


def fields(body: Any, *, skip: Any = None) -> str:
    """Return a table of the fields a body accepts.

    Args:
        body: a pydantic model.
        skip: a model whose fields are described elsewhere.

    Raises:
        KeyError: nobody has said what a field means.
    """
    ours = attributes("kvloom.params", "SamplingParams")
    own = body.model_fields
    known = {} if skip is None else skip.model_fields
    rows = []
    for name in sorted(own.keys() - known.keys()):
        required = " (required)" if own[name].is_required() else ""
        meaning = MEANINGS[name] if name in MEANINGS else ours[name]
        rows.append((f"`{name}`{required}", meaning.replace("None", "`null`")))
    return table(("field", "meaning"), rows)


def refused(harmless: Mapping[str, tuple[Any, ...]], *, without: Any = ()) -> str:
    """Return a table of the fields that are refused, and the values that are let pass."""
    rows = []
    for name in sorted(harmless.keys() - set(without)):
        values = [f"`{json.dumps(value)}`" for value in (None, *harmless[name])]
        rows.append((f"`{name}`", ", ".join(values)))
    return table(("field", "accepted only as"), rows)


def routes() -> str:
    """Return a table of the routes there are."""
    from fastapi.routing import APIRoute

    from kvloom.serve import document_routes
    from kvloom.serve.routes import router

    both = [*router.routes, *document_routes.router.routes]
    found = [route for route in both if isinstance(route, APIRoute)]
    rows = [
        (f"`{' '.join(sorted(route.methods or ()))}`", f"`{route.path}`", route.description)
        for route in found
    ]
    return table(("method", "path", "what it does"), rows)


def metrics() -> str:
    """Return a table of the metrics, without those of the process."""
    from kvloom.serve.metrics import Metrics

    found = {
        metric.name: (metric.type, metric.documentation)
        for metric in Metrics().registry.collect()
        if not metric.name.startswith("process_")
    }
    rows = [(f"`{name}`", *found[name]) for name in sorted(found)]
    return table(("metric", "type", "meaning"), rows)


def command_line() -> str:
    """Return the help of every command."""
    return "\n\n".join(command_help(words) for words in commands())


def commands() -> Iterator[tuple[str, ...]]:
    """Yield every command as words, groups before what they hold."""
    import typer

    from kvloom.cli import make_app

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, (*words, name))

    yield from below(typer.main.get_command(make_app()), ())


def command_help(words: tuple[str, ...]) -> str:
    """Return a heading and what `kvloom WORDS --help` prints."""
    from typer.testing import CliRunner

    from kvloom.cli import make_app

    result = CliRunner(env={"COLUMNS": "88", "TERMINAL_WIDTH": "88"}).invoke(
        make_app(), [*words, "--help"], prog_name="kvloom"
    )
    title = " ".join(("kvloom", *words))
    return f"## `{title}`\n\n```text\n{result.output.strip()}\n```"


def attributes(module: str, name: str) -> dict[str, str]:
    """Return what a class's docstring says about its attributes, on one line each."""
    from importlib import import_module

    text = getdoc(getattr(import_module(module), name)) or ""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    assert section is not None, f"{name} documents no attributes"
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section[1], re.MULTILINE)
    return {entry: " ".join(meaning.split()).rstrip(".") for entry, meaning in entries}
