"""Prompts that ask for the text between a prefix and a suffix.

Knows: how tokenizers spell the control tokens of filling in the middle, and in which order models
with such tokens were made to read them.
Does not know: HTTP, or whether a model was trained on the tokens that its vocabulary holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvloom.serve.backend import Tokenizer

InfillKind = Literal["native", "emulated"]
EMULATED = "The text behind the gap:\n{suffix}\n\nThe whole text from its beginning:\n{prefix}"


@dataclass(frozen=True, slots=True)
class InfillSpelling:
    """How one family of tokenizers spells the control tokens.

    Attributes:
        prefix: stands before the prefix.
        suffix: stands before the suffix.
        middle: stands where the text to be found begins; None where the prefix comes last.
        repository: stands before a repository's name.
        file: stands before a file's name.
        ends: further tokens that end the text.
    """

    prefix: str
    suffix: str
    middle: str | None
    repository: str | None = None
    file: str | None = None
    ends: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every spelling there is."""
        named = (self.prefix, self.suffix, self.middle, self.repository, self.file)
        return (*(text for text in named if text is not None), *self.ends)


SPELLINGS = (
    # Qwen2.5-Coder (Hui et al. 2024), section 3.2; Granite code models use the first three.
    InfillSpelling(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        "<|repo_name|>",
        "<|file_sep|>",
        ("<|fim_pad|>", "<|endoftext|>"),
    ),
    # StarCoder 2 (Lozhkov et al. 2024), section 5.
    InfillSpelling(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        "<repo_name>",
        "<file_sep>",
        ("<fim_pad>", "<|endoftext|>"),
    ),
    # SantaCoder (Ben Allal et al. 2023).
    InfillSpelling("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<fim-pad>",)),
    # Code Llama (Rozière et al. 2023), section 2.3; the tokens' own spelling has a word mark.
    InfillSpelling("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    InfillSpelling("<PRE>", "<SUF>", "<MID>", ends=("<EOT>",)),
    # DeepSeek-Coder (Guo et al. 2024), section 3.1.
    InfillSpelling("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ends=("<|EOT|>",)),
    InfillSpelling("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    # Codestral: the suffix first, then the prefix, which the text goes on from.
    InfillSpelling("[PREFIX]", "[SUFFIX]", None),
)


@dataclass(frozen=True, slots=True)
class ExtraText:
    """Another text that may help.

    Attributes:
        filename: its name; empty for none.
        text: what it says.
    """

    filename: str
    text: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What is known around the text that is asked for.

    Attributes:
        prefix: what stands before it.
        suffix: what stands behind it.
        begun: its own beginning, which is given.
        extras: other texts, the most useful last.
    """

    prefix: str
    suffix: str
    begun: str = ""
    extras: tuple[ExtraText, ...] = ()


@dataclass(frozen=True, slots=True)
class InfillPrompt:
    """A prompt whose completion fills a gap.

    Attributes:
        kind: `native` with the tokenizer's own control tokens, `emulated` by plain words.
        token_ids: the prompt.
        stop_token_ids: control tokens that end the completion.
    """

    kind: InfillKind
    token_ids: list[int]
    stop_token_ids: tuple[int, ...] = ()


def infill_prompt(tokenizer: Tokenizer, gap: Gap) -> InfillPrompt:
    """Return the prompt that asks for a gap's text."""
    for spelling in SPELLINGS:
        ids = _control_ids(tokenizer, spelling)
        needed = (spelling.prefix, spelling.suffix, spelling.middle)
        if all(text is None or text in ids for text in needed):
            token_ids = [*tokenizer.encode("")[:1], *_native(tokenizer, spelling, ids, gap)]
            return InfillPrompt("native", token_ids, tuple(sorted(set(ids.values()))))
    text = EMULATED.format(suffix=gap.suffix, prefix=gap.prefix) + gap.begun
    return InfillPrompt("emulated", tokenizer.encode(_joined(gap.extras) + text))


def _control_ids(tokenizer: Tokenizer, spelling: InfillSpelling) -> dict[str, int]:
    """Return the spellings that are one token each."""
    found = {}
    for text in spelling.all:
        ids = tokenizer.encode(text, add_special_tokens=False)
        # A tokenizer that puts a space before a text decodes to the spelling without it.
        if len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=False).strip() == text:
            found[text] = ids[0]
    return found


def _native(
    tokenizer: Tokenizer, spelling: InfillSpelling, ids: dict[str, int], gap: Gap
) -> list[int]:
    def plain(text: str) -> list[int]:
        return _encode_plainly(tokenizer, text, ids)

    prefix = [ids[spelling.prefix], *plain(gap.prefix)]
    suffix = [ids[spelling.suffix], *plain(gap.suffix)]
    before: list[int] = []
    if gap.extras and spelling.repository in ids and spelling.file in ids:
        before = [ids[spelling.repository], *plain("project\n")]
        for extra in gap.extras:
            before += [ids[spelling.file], *plain(f"{extra.filename}\n{extra.text}\n")]
        before += [ids[spelling.file], *plain("file\n")]
    elif gap.extras:
        before = plain(_joined(gap.extras))
    if spelling.middle is None:
        return [*before, *suffix, *prefix, *plain(gap.begun)]
    return [*before, *prefix, *suffix, ids[spelling.middle], *plain(gap.begun)]


def _joined(extras: Sequence[ExtraText]) -> str:
    return "".join(f"{x.filename}\n{x.text}\n\n" if x.filename else f"{x.text}\n\n" for x in extras)


def _encode_plainly(tokenizer: Tokenizer, text: str, ids: dict[str, int]) -> list[int]:
    """Return the tokens of a text; a control token spelled in it is cut, so that none is."""
    control = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))
    tokens: list[int] = []
    begin = 0
    while text and (found := control.search(text, begin)):
        tokens += tokenizer.encode(text[begin : found.start() + 1], add_special_tokens=False)
        begin = found.start() + 1
    if begin < len(text):
        tokens += tokenizer.encode(text[begin:], add_special_tokens=False)
    return tokens
