"""A tokenizer kept beside packed weights, which opens without transformers.

Knows: what `FastTokenizer` asks of a transformers tokenizer, as plain data.
Does not know: how text becomes tokens; the tokenizers library does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer is beside its vocabulary.

    Attributes:
        eos_token_id: token that ends a text.
        bos_token_id: token that begins a text.
        chat_template: Jinja source of the default template; None for none.
        special_tokens: names of special tokens, for the template.
    """

    eos_token_id: int | None
    bos_token_id: int | None
    chat_template: str | None
    special_tokens: dict[str, Any]


def facts_of(tokenizer: Any) -> TokenizerFacts:
    """Return the facts of a transformers tokenizer."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    special = {
        name: value
        for name, value in tokenizer.special_tokens_map.items()
        if isinstance(value, str)
    }
    return TokenizerFacts(tokenizer.eos_token_id, tokenizer.bos_token_id, template, special)


class StoredTokenizer:
    """Stands in for a transformers tokenizer, for the calls that kvloom makes."""

    is_fast = True

    def __init__(self, backend: Tokenizer, facts: TokenizerFacts) -> None:
        self.backend_tokenizer = backend
        self.eos_token_id = facts.eos_token_id
        self.bos_token_id = facts.bos_token_id
        self.chat_template = facts.chat_template
        self.special_tokens_map = facts.special_tokens

    def get_chat_template(self) -> str | None:
        """Return the default template."""
        return self.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Render messages by the function that transformers itself calls."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize, "only text is rendered"
        told = [{key: value for key, value in m.items() if value is not None} for m in messages]
        render: Any = render_jinja_template
        rendered, _ = render(
            conversations=[told],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens_map,
        )
        text: str = rendered[0]
        return text
