"""Tokenizers for the tests of text: the embedded model's, and byte-fallback ones made here.

Knows: how `tokenizers` spells bytes in its vocabularies.
Does not know: kvloom's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


class LibraryText:
    """A `tokenizers.Tokenizer` as the decode room wants it."""

    def __init__(self, backend: Tokenizer, end: str) -> None:
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.eos_token_ids = frozenset({backend.token_to_id(end)})
        self.joins_bytes = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def from_folder(cls, folder: Path, end: str) -> LibraryText:
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), end)

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.backend.id_to_token(token_id)
        if piece is None or token_id in self.special_ids:
            return b""
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return bytes(self._byte_of_letter[letter] for letter in piece)
        return str(piece).replace("▁", " ").encode()

    @cached_property
    def _byte_of_letter(self) -> dict[str, int]:
        # The alphabet keeps printable bytes and moves the others behind Latin-1, in order.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        own = [letter for letter in alphabet if ord(letter) < 256]
        moved = [byte for byte in range(256) if chr(byte) not in own]
        table = {letter: ord(letter) for letter in own}
        return table | {chr(256 + place): byte for place, byte in enumerate(moved)}


def byte_fallback_text(*, strip: bool) -> LibraryText:
    """A small SentencePiece-like tokenizer: pieces with a space sign, and a token for every byte.

    Args:
        strip: take the first space away as Llama does; else by Metaspace.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(letter) for letter in range(97, 123)] + list("AB.,!") + ["é", "�", "▁▁"]
    merges = [("▁", letter) for letter in "abcthw"] + [("▁t", "h"), ("▁th", "e"), ("i", "n")]
    pieces += [left + right for left, right in merges]
    backend = Tokenizer(
        models.BPE(
            {piece: place for place, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tail = [decoders.Fuse(), decoders.Strip(" ", 1, 0)] if strip else []
    head = decoders.Replace("▁", " ") if strip else decoders.Metaspace()
    backend.decoder = decoders.Sequence([head, decoders.ByteFallback(), *tail])
    return LibraryText(backend, "</s>")
