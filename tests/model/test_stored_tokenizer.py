"""A stored tokenizer does what the transformers tokenizer does that it was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.model.stored_tokenizer import TokenizerFacts, facts_of
from kvloom.model.tokenizer import FastTokenizer, load_tokenizer
from tests.model.tiny_models import byte_level_tokenizer

# Templates write special tokens, look for absent keys, and end generation prompts differently.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.name %} by {{ m.name }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}{% if 'content' in m %}{{ m.content | trim }}{% else %}-{% endif %}"
    "{% endfor %}",
    "{{ messages | tojson }}",
]
roles = st.sampled_from(["system", "user", "assistant"])
chats = st.lists(
    st.fixed_dictionaries(
        {"role": roles, "content": st.text(max_size=20)}, optional={"name": st.text(max_size=5)}
    ),
    min_size=1,
    max_size=4,
)


def both(template: str | None) -> tuple[FastTokenizer, FastTokenizer]:
    """Return a tokenizer of transformers, and what was stored of it."""
    first = FastTokenizer(byte_level_tokenizer(chat_template=template), [7])
    text, facts = first.stored()
    kept = TokenizerFacts(**json.loads(json.dumps(asdict(facts))))
    return first, FastTokenizer.from_stored(text, kept, first.eos_token_ids)


@pytest.mark.parametrize("template", TEMPLATES)
@given(chat=chats)
def test_chats_are_rendered_alike(template, chat):
    first, second = both(template)
    assert second.render_chat(chat) == first.render_chat(chat)
    assert second.chat_tokens(chat) == first.chat_tokens(chat)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_content_of_none_is_treated_alike(template: str) -> None:
    first, second = both(template)
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "name": None},
        {"role": "user", "content": ""},
    ]
    answers = []
    for tokenizer in (first, second):
        try:
            answers.append(tokenizer.render_chat(chat))
        except RequestError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


@given(text=st.text(), special=st.booleans())
def test_texts_are_encoded_and_decoded_alike(text, special):
    first, second = both(TEMPLATES[0])
    ids = first.encode(text, add_special_tokens=special)
    assert second.encode(text, add_special_tokens=special) == ids
    assert second.decode(ids) == first.decode(ids)


def test_all_that_is_known_of_tokens_is_kept() -> None:
    first, second = both(TEMPLATES[0])
    for name in ("eos_token_ids", "bos_token_id", "special_ids", "vocab_size"):
        assert getattr(second, name) == getattr(first, name)
    assert second.digest() == first.digest()
    spelled = [[t.token_bytes(i) for i in range(-1, first.vocab_size + 1)] for t in (first, second)]
    assert spelled[0] == spelled[1]
    assert second.stored() == first.stored()


def test_without_a_template_messages_are_refused() -> None:
    _, second = both(None)
    with pytest.raises(RequestError, match="no chat template"):
        second.render_chat([{"role": "user", "content": "Hello"}])


def test_facts_are_plain_data() -> None:
    facts = facts_of(byte_level_tokenizer())
    assert (facts.eos_token_id, facts.bos_token_id) == (0, 1)
    assert facts.special_tokens == {"bos_token": "<|turn|>", "eos_token": "<|end|>"}
    assert json.loads(json.dumps(asdict(facts))) == asdict(facts)


def test_the_embedded_models_tokenizer(default_model_path: Path) -> None:
    first = load_tokenizer(default_model_path)
    text, facts = first.stored()
    second = FastTokenizer.from_stored(text, facts, first.eos_token_ids)
    chat = [{"role": "user", "content": "Write a hello in C.\n"}]
    assert second.chat_tokens(chat) == first.chat_tokens(chat)
    source = Path(__file__).read_text(encoding="utf-8")
    assert second.encode(source) == first.encode(source)


def test_it_opens_and_encodes_without_transformers(tmp_path: Path) -> None:
    text, facts = FastTokenizer(byte_level_tokenizer()).stored()
    (tmp_path / "text").write_text(text, encoding="utf-8")
    (tmp_path / "facts").write_text(json.dumps(asdict(facts)))
    code = (
        "import json, sys; from pathlib import Path\n"
        "from kvloom.model.stored_tokenizer import TokenizerFacts\n"
        "from kvloom.model.tokenizer import FastTokenizer\n"
        "folder = Path(sys.argv[1]); facts = json.loads((folder / 'facts').read_text())\n"
        "text = (folder / 'text').read_text(encoding='utf-8')\n"
        "made = FastTokenizer.from_stored(text, TokenizerFacts(**facts), [0])\n"
        "print(made.decode(made.encode('Hello, you')), 'transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["Hello,", "you", "False"]
