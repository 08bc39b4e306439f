"""Trials notice state, guessed positions and learned positions, on runners that pretend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.model.trial import (
    MOVE,
    TOLERANCE,
    check_runner,
    differs,
    last_position,
    relative_positions,
)
from kvloom.types import LayerSpec, ModelSpec, Observer, Rows, StepOutput
from tests.model.running import some_tokens

VOCABULARY = 11
LAYER = LayerSpec(index=0, heads=1, kv_heads=1, k_dim=4, v_dim=4, rope=None)
SPEC = ModelSpec((LAYER,), VOCABULARY, 512, "movable")
# Logits of a row from (token, position, tokens so far of its document, row in the step).
Head = Callable[[int, int, list[int], int], float]


@dataclass
class Pretender:
    """A runner without a model: a formula gives every row's logits."""

    head: Head
    spec: ModelSpec = SPEC
    steps: list[list[int]] = field(default_factory=list)

    def forward(
        self,
        rows: Sequence[Rows],
        observe: Observer | None = None,
        stop_after: int | None = None,
    ) -> StepOutput:
        self.steps.append([len(entry.tokens) for entry in rows])
        logits, row = [], 0
        for entry in rows:
            entry.doc.append(entry.tokens.tolist())
            found = []
            for token, pos in zip(entry.tokens.tolist(), entry.pos.tolist(), strict=True):
                text = entry.doc.tokens[: pos - entry.doc.start_pos + 1]
                found.append(self.row_of(self.head(token, pos, text, row)))
                row += 1
            logits.append(None if entry.logits == "none" else torch.stack(found))
        return StepOutput(tuple(logits))

    @staticmethod
    def row_of(number: float) -> Tensor:
        return torch.cos(number * torch.arange(1.0, VOCABULARY + 1))


def truth_of(head: Head, tokens: Tensor) -> Tensor:
    ids = tokens.tolist()
    return torch.stack(
        [Pretender.row_of(head(token, pos, ids[: pos + 1], pos)) for pos, token in enumerate(ids)]
    )


def by_text(token: int, pos: int, text: list[int], row: int) -> float:
    return float(sum(text) % 97 + len(text))


@pytest.mark.parametrize("count", [2, 3, 7, 12, 48, 130])
def test_right_runner_passes_at_any_length(count: int) -> None:
    tokens = torch.from_numpy(some_tokens(count))
    runner = Pretender(by_text)
    assert check_runner(runner, tokens, truth_of(by_text, tokens), torch.float32) == (0.0, "")
    assert sum(step[-1] for step in runner.steps) == count
    if count >= 12:
        assert len(runner.steps[0]) == 2, "the first chunk is packed with another document"
        assert runner.steps[-1] == [1]


def test_positions_guessed_from_the_step_show() -> None:
    tokens = torch.from_numpy(some_tokens(48))

    def by_row(token: int, pos: int, text: list[int], row: int) -> float:
        return float(token + row)

    difference, where = check_runner(
        Pretender(by_row), tokens, truth_of(by_row, tokens), torch.float32
    )
    assert difference > 1
    assert where


def test_state_outside_of_the_documents_shows() -> None:
    tokens = torch.from_numpy(some_tokens(48))
    state = [0]

    def by_state(token: int, pos: int, text: list[int], row: int) -> float:
        state[0] = token if row == 0 else state[0] + token
        return float(state[0])

    truth = truth_of(by_state, tokens)
    difference, where = check_runner(Pretender(by_state), tokens, truth, torch.float32)
    assert difference > 1
    assert where.startswith(("in packed rows", "when it goes on at token"))


def test_relative_and_absolute_positions_are_told_apart() -> None:
    tokens = torch.from_numpy(some_tokens(48))
    assert relative_positions(Pretender(by_text), tokens, torch.float32)

    def by_position(token: int, pos: int, text: list[int], row: int) -> float:
        return float(token + pos)

    assert not relative_positions(Pretender(by_position), tokens, torch.float32)


@pytest.mark.parametrize("limit", [MOVE + 1, MOVE + 2, 30, 48])
def test_positions_of_a_short_model_are_tried_as_far_as_they_reach(limit: int) -> None:
    tokens = torch.from_numpy(some_tokens(48))
    seen: list[int] = []

    def noting(token: int, pos: int, text: list[int], row: int) -> float:
        seen.append(pos)
        return by_text(token, pos, text, row)

    relative_positions(Pretender(noting, replace(SPEC, max_positions=limit)), tokens, torch.float32)
    assert not seen or max(seen) < limit


@pytest.mark.parametrize("last", [0, 1, 447, 510, 511])
def test_last_position_is_found(last: int) -> None:
    def learned(token: int, pos: int, text: list[int], row: int) -> float:
        if pos > last:
            raise IndexError("index out of range in self")
        return 0.0

    assert last_position(Pretender(learned), torch.float32) == last


def test_other_errors_are_not_taken_for_the_last_position() -> None:
    def broken(token: int, pos: int, text: list[int], row: int) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        last_position(Pretender(broken), torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_difference_is_in_units_of_the_tolerance(dtype: torch.dtype) -> None:
    expected = torch.tensor([[4.0, -8.0]])
    found = expected + torch.tensor([[8.0 * TOLERANCE[dtype], 0.0]])
    assert differs(found, expected, dtype) == pytest.approx(1.0, rel=1e-2)
    assert differs(expected, expected, dtype) == 0
    assert differs(torch.full((1, 2), float("nan")), expected, dtype) == np.inf
    assert differs(expected, torch.full((1, 2), float("nan")), dtype) != 0
    assert differs(expected[:, :1], expected, dtype) == np.inf
