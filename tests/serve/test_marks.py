"""Templates cut where parts stand: pieces and parts give back what the template writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvloom.serve.marks import Marked, cut_at_parts

# Written after the habits of known families: what they do to a message's text is what matters.
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
STRIPPING = """<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>

{{ m.content | trim }}<|eot|>{% endfor %}"""
SYSTEM_IN_USER = """{% set ns = namespace(before='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.before = m.content | trim + '\\n\\n' %}
{%- else %}<turn>{{ m.role }}: {{ ns.before }}{{ m.content | trim }}</turn>
{%- set ns.before = '' %}{% endif %}{% endfor %}"""
BACKWARDS = "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content }} / {{ m.content }}\n{% endfor %}"
LAST_ONLY = "{{ messages[-1].content }}"
THINKING = """{% for m in messages %}{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"""
QUOTING = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
CUTTING = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"

FAITHFUL = [PLAIN, STRIPPING, SYSTEM_IN_USER, BACKWARDS, TWICE, LAST_ONLY]
ODD = [THINKING, QUOTING, SHOUTING, CUTTING]

texts = st.text(st.characters(codec="utf-8"), max_size=12)
# A message: whether it is the system's, and texts or parts (given as a list of one).
messages = st.lists(
    st.tuples(st.booleans(), st.lists(st.one_of(texts, texts.map(lambda text: [text])))),
    min_size=1,
    max_size=4,
)
Messages = list[tuple[bool, list[str | list[str]]]]


def parts_of(asked: Messages) -> list[str]:
    return [part[0] for _, content in asked for part in content if isinstance(part, list)]


def renderer(template: str, asked: Messages) -> Callable[[Sequence[str]], str]:
    compiled = ImmutableSandboxedEnvironment().from_string(template)

    def render(spellings: Sequence[str]) -> str:
        following = iter(spellings)
        written = [
            {
                "role": "system" if system else "user",
                "content": "\n".join(x if isinstance(x, str) else next(following) for x in content),
            }
            for system, content in asked
        ]
        return compiled.render(messages=written)

    return render


def spelled(marked: Marked, parts: Sequence[str]) -> str:
    return "".join(parts[x] if isinstance(x, int) else x for x in marked.pieces)


@pytest.mark.parametrize("template", [*FAITHFUL, *ODD])
@given(messages)
def test_pieces_and_parts_give_back_what_is_written(template: str, asked: Messages) -> None:
    parts, render = parts_of(asked), renderer(template, asked)
    marked = cut_at_parts(render, parts)
    assert marked.faithful or template in ODD
    if marked.faithful:
        assert "".join(spelled(marked, parts).split()) == "".join(render(parts).split())
    if template in (PLAIN, BACKWARDS, TWICE):
        assert spelled(marked, parts) == render(parts)
    if template == PLAIN:
        assert [x for x in marked.pieces if isinstance(x, int)] == list(range(len(parts)))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (THINKING, "a</think>b"),
        (QUOTING, 'say "so"'),
        (SHOUTING, "loud"),
        (CUTTING, "longer than all that is shown"),
    ],
)
def test_a_template_that_reads_a_part_is_told(template: str, text: str) -> None:
    render = renderer(template, [(False, ["before ", [text], " behind"])])
    assert not cut_at_parts(render, [text]).faithful


def test_no_text_can_be_taken_for_a_mark() -> None:
    seen: list[Sequence[str]] = []

    def watched(spellings: Sequence[str]) -> str:
        seen.append(spellings)
        return " ".join(spellings)

    cut_at_parts(watched, ["a"])
    forged = seen[0][0]
    marked = cut_at_parts(lambda spellings: f"{forged} {spellings[0]}", [forged])
    assert marked.pieces == (f"{forged} ", 0)
    assert marked.faithful


def test_white_space_of_a_part_stays_where_a_template_strips() -> None:
    text = "\n  indented\n"
    marked = cut_at_parts(renderer(STRIPPING, [(False, [[text], "Why?"])]), [text])
    assert marked.faithful
    assert spelled(marked, [text]).count(text) == 1
