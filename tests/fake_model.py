"""A model without weights whose logits depend on every token it can see, and its oracle.

Knows: how to mark pool slots with token, position and context, and to read them back by the plan.
Does not know: attention. A wrong slot, a stale one, a wrong owner or position changes the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.fold import FoldPlan, Piece, plan_fold, write
from kvloom.model.placing import placed
from kvloom.types import LayerSpec, ModelSpec, Observer, Positions, Rows, StepOutput

VOCAB_SIZE = 32
EOS = 0
MAX_POSITIONS = 4096


class FakeRunner:
    """Runs rows: a row's context is the hash of all slots it sees, and its logits follow from it.

    Attributes:
        steps: rows per document of every step that was run.
        failures: raised by the next steps, one each; None lets a step pass.
    """

    def __init__(
        self,
        max_positions: int = MAX_POSITIONS,
        num_layers: int = 1,
        positions: Positions = "movable",
    ) -> None:
        layers = tuple(LayerSpec(index, 1, 1, 2, 2, None) for index in range(num_layers))
        self.spec = ModelSpec(layers, VOCAB_SIZE, max_positions, positions)
        self.scales = [1.0] * num_layers
        self.steps: list[list[int]] = []
        self.failures: list[BaseException | None] = []

    def forward(
        self,
        rows: Sequence[Rows],
        observe: Observer | None = None,
        stop_after: int | None = None,
    ) -> StepOutput:
        with placed(rows) as (docs, slots):
            if (failure := self.failures.pop(0) if self.failures else None) is not None:
                raise failure
            plan = plan_fold(docs, [entry.pos for entry in rows], slots, [None])
            self.steps.append([len(entry.tokens) for entry in rows])
            digests = self._run(plan, np.concatenate([entry.tokens for entry in rows]))
            for layer in range(0 if observe is None else len(self.spec.layers)):
                assert observe is not None
                k, v = (x[layer][:, plan.write_slots] for x in (plan.pool.keys, plan.pool.values))
                observe.observe(layer, k, k, v)
        if stop_after is not None:
            return StepOutput(tuple(None for _ in rows))
        outputs: list[Tensor | None] = []
        start = 0
        for entry in rows:
            stop = start + len(entry.tokens)
            first = {"none": stop, "last": stop - 1, "all": start}[entry.logits]
            wanted = [_logits(digest) for digest in digests[first:stop]]
            outputs.append(torch.stack(wanted) if wanted else None)
            start = stop
        return StepOutput(tuple(outputs))

    def _run(self, plan: FoldPlan, tokens: np.ndarray) -> list[bytes]:
        """Write the rows one by one, each with the hash of what it sees; return the hashes."""
        fresh = torch.zeros(1, plan.num_rows, 2)
        keys = torch.stack([torch.from_numpy(tokens).float(), plan.pos.float()], dim=1)[None]
        for layer in range(len(self.spec.layers)):
            write(plan, layer, keys, fresh)
        contexts = plan.pool.values[-1][0]  # of the last layer, as in a model
        digests = []
        slots = torch.arange(plan.pool.num_blocks * 64)[plan.write_slots]
        seen = _seen_slots(plan)
        for row, own in enumerate(slots.tolist()):
            found = [pair for pair in seen[row] if pair[0] != own]
            assert len(found) == len(seen[row]) - 1, "a row does not see itself once"
            others, shifts = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T
            entries = torch.cat([plan.pool.keys[0][0, others], contexts[others]], 1)
            entries[:, 1] += shifts  # where a key stands now
            entries = entries[entries[:, 1].argsort()].numpy()
            digest = _digest(entries, int(tokens[row]), int(plan.pos[row]))
            contexts[own] = torch.tensor(_context(digest))
            digests.append(digest)
        return digests


def _seen_slots(plan: FoldPlan) -> list[list[tuple[int, int]]]:
    """Return the slots that each row sees, with the shift of each."""
    seen: list[list[tuple[int, int]]] = [[] for _ in range(plan.num_rows)]
    for piece in plan.pieces[None]:
        rows = torch.arange(plan.num_rows)[piece.rows].tolist()
        slots = torch.arange(piece.start, piece.stop)
        shifts = torch.full_like(slots, piece.shift)
        if piece.gathered is not None:
            slots, shifts = piece.gathered.slots, piece.gathered.shifts
        pairs = list(zip(slots.tolist(), shifts.tolist(), strict=True))
        for number, row in enumerate(rows):
            seen[row] += [pairs[index] for index in _seen_of(piece, number, len(pairs))]
    return seen


def _seen_of(piece: Piece, number: int, count: int) -> list[int]:
    """Return which of a piece's slots are seen by one of its rows."""
    if piece.causal:
        return list(range(number + 1))
    if piece.mask is None:
        return list(range(count))
    return (piece.mask[number] == 0).nonzero()[:, 0].tolist()


def _digest(entries: np.ndarray, token: int, position: int) -> bytes:
    """Hash what a row sees: fp32 (slots, 4) of token, position and context, by position."""
    seal = hashlib.blake2b(np.ascontiguousarray(entries, dtype=np.float32).tobytes())
    seal.update(np.array([token, position], dtype=np.int64).tobytes())
    return seal.digest()


def _context(digest: bytes) -> tuple[float, float]:
    """Two integers that fp32 holds exactly."""
    return float(int.from_bytes(digest[:3], "big")), float(int.from_bytes(digest[3:6], "big"))


def _logits(digest: bytes) -> Tensor:
    raw = hashlib.shake_128(digest).digest(4 * VOCAB_SIZE)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint32).astype(np.float64) / 2**29).float()


class Oracle:
    """The logits of plain token lists, without pages, documents or steps."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[np.ndarray, bytes]] = {}

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits (v) behind the last token."""
        return _logits(self._read(tuple(tokens))[1])

    def _read(self, tokens: tuple[int, ...]) -> tuple[np.ndarray, bytes]:
        known = len(tokens)
        while known and tokens[:known] not in self._known:
            known -= 1
        entries, digest = self._known.get(tokens[:known], (np.empty((0, 4), np.float32), b""))
        for position in range(known, len(tokens)):
            digest = _digest(entries, tokens[position], position)
            entry = np.array([[tokens[position], position, *_context(digest)]], dtype=np.float32)
            entries = np.concatenate([entries, entry])
            self._known[tokens[: position + 1]] = (entries, digest)
        return entries, digest


class LetterTokenizer:
    """Token 1 is "a", token 26 is "z", others are signs; token 0 ends a text and has none."""

    special_ids = frozenset({EOS})
    eos_token_ids = frozenset({EOS})
    bos_token_id = None
    vocab_size = VOCAB_SIZE
    joins_bytes = True
    letters = "\0abcdefghijklmnopqrstuvwxyz .,:\n"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        named = [t for t in token_ids if t != EOS or not skip_special_tokens]
        return "".join("<end>" if t == EOS else self.letters[t] for t in named)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else self.letters[token_id].encode()

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)

    def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.encode(self.render_chat(messages))
