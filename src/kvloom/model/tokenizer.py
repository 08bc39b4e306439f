"""Text to token ids and back, and the bytes that each token stands for.

Knows: Hugging Face fast tokenizers, their decoders and chat templates.
Does not know: models, or how text is streamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvloom.errors import ModelLoadError, RequestError, UnsupportedModelError
from kvloom.model.stored_tokenizer import StoredTokenizer, TokenizerFacts, facts_of


class TextTokenizer(Protocol):
    """What the rooms above may ask of a tokenizer.

    Attributes:
        eos_token_ids: tokens that end a text.
        bos_token_id: token that begins a text, if there is one.
        special_ids: control tokens, which stand for no text.
        vocab_size: the largest token id plus one.
        joins_bytes: whether a text is its tokens' bytes one behind the other, wherever they stand.
    """

    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    special_ids: frozenset[int]
    vocab_size: int
    joins_bytes: bool

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; bytes that are no whole character become U+FFFD."""
        ...

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt that asks for the next assistant message."""
        ...

    def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of `render_chat`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; none for special and unknown tokens."""
        ...


class FastTokenizer:
    """A `TextTokenizer` over a Hugging Face fast tokenizer.

    As in transformers, the spelling of a special token inside a text becomes that token, and a
    SentencePiece tokenizer that puts a space before a text puts it into its first token's bytes.
    Bytes that a vocabulary lacks are lost (SmolLM2's lacks a few control characters).

    Args:
        tokenizer: a fast tokenizer of transformers.
        eos_token_ids: tokens that end a text beside the tokenizer's own.

    Raises:
        UnsupportedModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Iterable[int] = ()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                f"the tokenizer {type(tokenizer).__name__} has no fast version; "
                "save the model with a tokenizer.json."
            )
        self._tokenizer = tokenizer
        # Straight to the backend: the wrapper sets truncation at every call and so is not
        # safe to call from two threads.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        self._added_text: dict[int, str] = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        own_eos = {tokenizer.eos_token_id} - {None}
        self.eos_token_ids = frozenset(eos_token_ids) | frozenset(own_eos)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        decoder = json.loads(self._backend.to_str())["decoder"]
        self._to_bytes = _token_to_bytes(decoder)
        self.joins_bytes = decoder is not None and decoder["type"] == "ByteLevel"
        self._known_bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text.

        Raises:
            RequestError: the text holds half of a surrogate pair, which is no character.
        """
        return self._encode(text, add_special_tokens, "prompt")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; bytes that are no whole character become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt that asks for the next assistant message.

        Raises:
            RequestError: the model has no chat template, or it does not take these messages.
        """
        _check_messages(messages)
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template, so it cannot answer messages; "
                "send the whole text as a prompt instead.",
                param="messages",
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and fails in its own ways
            raise RequestError(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return text

    def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of `render_chat`; the template writes the special tokens itself.

        Raises:
            RequestError: as `render_chat` and `encode`.
        """
        return self._encode(self.render_chat(messages), False, "messages")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; none for special and unknown tokens."""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if token_id in self.special_ids:
            return b""
        if token_id in self._added_text:
            return self._added_text[token_id].encode()
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return b"" if token is None else self._to_bytes(token)

    def stored(self) -> tuple[str, TokenizerFacts]:
        """Return the tokenizer as text and facts, from which `from_stored` makes it again."""
        return self._backend.to_str(), facts_of(self._tokenizer)

    @classmethod
    def from_stored(
        cls, text: str, facts: TokenizerFacts, eos_token_ids: Iterable[int]
    ) -> FastTokenizer:
        """Return a tokenizer from what `stored` gave; transformers is not loaded."""
        from tokenizers import Tokenizer

        return cls(StoredTokenizer(Tokenizer.from_str(text), facts), eos_token_ids)

    def digest(self) -> str:
        """Return the SHA-256 of everything that decides how text becomes tokens."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a surrogate pair at character {error.start}, "
                "which is no Unicode text; remove it.",
                param=param,
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def load_tokenizer(
    folder: Path, eos_token_ids: Iterable[int] = (), *, trust_remote_code: bool = False
) -> FastTokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        ModelLoadError: the folder holds no tokenizer, or a damaged one.
        UnsupportedModelError: the tokenizer is not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the readers raise whatever a broken file leads to
        raise ModelLoadError(
            f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}; "
            "a tokenizer.json is needed."
        ) from error
    return FastTokenizer(tokenizer, eos_token_ids)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            "messages must be a list with at least one message, "
            'such as [{"role": "user", "content": "Hello"}].',
            param="messages",
        )
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"messages[{number}] must be an object with a role and a content.",
                param="messages",
            )


def _token_to_bytes(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """Return the function that spells a token in bytes, from the tokenizer's list of decoders."""
    steps = _flatten(decoder)
    if any(step["type"] == "ByteLevel" for step in steps):
        alphabet = _byte_alphabet()

        def from_byte_level(token: str) -> bytes:
            if all(letter in alphabet for letter in token):
                return bytes(alphabet[letter] for letter in token)
            return token.encode()

        return from_byte_level
    has_bytes = any(step["type"] == "ByteFallback" for step in steps)
    replacements = [pair for step in steps for pair in _replacements(step)]

    def from_pieces(token: str) -> bytes:
        if has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return from_pieces


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _replacements(step: dict[str, Any]) -> list[tuple[str, str]]:
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return [(step["pattern"]["String"], step["content"])]
    if step["type"] == "Metaspace":
        return [(step["replacement"], " ")]
    if step["type"] == "BPEDecoder":
        return [(step["suffix"], " ")]
    return []


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each letter in which byte-level BPE spells its tokens.

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 onwards.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
