"""Prompts for gaps: the control tokens where there are some, and never made by what users write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.serve.infill import SPELLINGS, ExtraText, Gap, InfillSpelling, infill_prompt

from .fake_llm import FakeTokenizer

EXTRAS = (ExtraText("a.py", "x = 1"), ExtraText("", "y = 2"))
texts = st.lists(st.sampled_from(["a", "zwölf", "\n", *SPELLINGS[0].all])).map("".join)


def shown(tokenizer: FakeTokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.prefix)
def test_every_spelling_is_found(spelling: InfillSpelling) -> None:
    tokenizer = FakeTokenizer(spelling.all)
    prompt = infill_prompt(tokenizer, Gap("before", "behind", "be"))
    assert prompt.kind == "native"
    assert set(prompt.stop_token_ids) == set(tokenizer.controls.values())
    if spelling.middle is None:
        expected = f"{spelling.suffix}behind{spelling.prefix}beforebe"
    else:
        expected = f"{spelling.prefix}before{spelling.suffix}behind{spelling.middle}be"
    assert shown(tokenizer, prompt.token_ids) == f"<s>{expected}"


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.prefix)
def test_half_a_set_is_no_set(spelling: InfillSpelling) -> None:
    prompt = infill_prompt(FakeTokenizer((spelling.prefix, "<|endoftext|>")), Gap("a", "b"))
    assert prompt.kind == "emulated"
    assert prompt.stop_token_ids == ()


def test_an_emulated_prompt_ends_with_what_goes_on() -> None:
    tokenizer = FakeTokenizer()
    text = shown(tokenizer, infill_prompt(tokenizer, Gap("PRE", "SUF", "go", EXTRAS)).token_ids)
    assert text.endswith("PREgo")
    assert text.index("x = 1") < text.index("y = 2") < text.index("SUF") < text.index("PRE")


def test_files_have_names_where_there_are_tokens_for_them() -> None:
    tokenizer = FakeTokenizer(SPELLINGS[0].all)
    text = shown(tokenizer, infill_prompt(tokenizer, Gap("P", "S", "", EXTRAS)).token_ids)
    assert text.startswith(
        "<s><|repo_name|>project\n<|file_sep|>a.py\nx = 1\n<|file_sep|>\ny = 2\n"
    )
    without = FakeTokenizer(SPELLINGS[2].all)
    text = shown(without, infill_prompt(without, Gap("P", "S", "", EXTRAS)).token_ids)
    assert text.startswith("<s>a.py\nx = 1\n\ny = 2\n\n<fim-prefix>P")


@given(texts, texts, texts, texts)
def test_no_control_token_comes_from_a_text(
    prefix: str, suffix: str, begun: str, extra: str
) -> None:
    tokenizer = FakeTokenizer(SPELLINGS[0].all)
    prompt = infill_prompt(tokenizer, Gap(prefix, suffix, begun, (ExtraText("f", extra),)))
    controls = [token for token in prompt.token_ids if token in tokenizer.controls.values()]
    names = [text for number in controls for text, i in tokenizer.controls.items() if i == number]
    spelling = SPELLINGS[0]
    assert names == [
        spelling.repository,
        spelling.file,
        spelling.file,
        spelling.prefix,
        spelling.suffix,
        spelling.middle,
    ]
    text = shown(tokenizer, prompt.token_ids)
    assert text.endswith(f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>{begun}")
