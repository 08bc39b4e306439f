"""The cost model: what steps and loads will take, from a few measured or stated coefficients.

Knows: arithmetic on counts of rows, cached tokens and bytes.
Does not know: torch, models or who measured.

Source: Fu 2024, "Challenges in Deploying Long-Context Transformers" (roofline forms), with a
constant per pass added, which a CPU engine needs. Loading against computing: Yao et al. 2025
(CacheBlend), section 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

import numpy as np

MEMORY = "memory"
"""The tier that needs no loading: KV that the pool holds."""
ASSUMED_BYTES_PER_S: Mapping[str, float] = MappingProxyType({"remote": 50e6})
"""Rates of tiers that nobody measures: what a network gives depends on who else uses it."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the roofline needs to know of a model.

    Attributes:
        parameters: all of them.
        layers: attention layers.
        heads: query heads.
        kv_heads: key and value heads.
        dim: of a head.
        weight_bytes: per parameter.
        kv_bytes: per value of K or V.
    """

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    dim: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return round(2 * self.layers * self.kv_heads * self.dim * self.kv_bytes)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the roofline needs to know of a machine.

    Attributes:
        flops: floating-point operations per second that are reached.
        bytes_per_s: from memory.
        tiers: bytes per second from further tiers, by name.
    """

    flops: float
    bytes_per_s: float
    tiers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of a model on a machine; every answer follows from them.

    Attributes:
        layers: attention layers.
        kv_bytes_per_token: bytes of keys and values of one token.
        pass_s: seconds of a forward pass beside its rows.
        row_s: seconds per row.
        pair_s: seconds per row and key that it sees.
        decode_s: seconds of a pass of one row that sees nothing.
        decode_token_s: seconds that each cached token adds to it.
        bytes_per_s: rate of loading, by tier; keys and values in `memory` need none.
        r2: share of the measured variance that the prefill coefficients explain; 1 where they
            are stated.
        error: largest relative error at lengths that the fit did not see; None where none is known.
    """

    layers: int
    kv_bytes_per_token: int
    pass_s: float
    row_s: float
    pair_s: float
    decode_s: float
    decode_token_s: float
    bytes_per_s: Mapping[str, float]
    r2: float = 1.0
    error: float | None = None

    @classmethod
    def roofline(cls, model: ModelSize, machine: Machine) -> CostModel:
        """Return the peak figures of a model on a machine."""
        return cls(
            layers=model.layers,
            kv_bytes_per_token=model.kv_bytes_per_token,
            pass_s=0.0,
            row_s=2 * model.parameters / machine.flops,
            pair_s=4 * model.layers * model.heads * model.dim / machine.flops,
            decode_s=model.parameters * model.weight_bytes / machine.bytes_per_s,
            decode_token_s=model.kv_bytes_per_token / machine.bytes_per_s,
            bytes_per_s=dict(machine.tiers),
        )

    @classmethod
    def unmeasured(cls, layers: int) -> CostModel:
        """Return coefficients for where nobody measures: rows cost, and nothing else does."""
        free = dict.fromkeys(("ram", "disk", "remote"), math.inf)
        return cls(layers, 1, 0.0, 1.0, 0.0, 1.0, 0.0, free)

    def prefill_s(self, rows: int, cached: int = 0) -> float:
        """Return the seconds of a pass of new rows behind cached tokens."""
        if rows == 0:
            return 0.0
        return self.pass_s + self.row_s * rows + self.pair_s * rows * (cached + rows / 2)

    def decode_step_s(self, cached: int, batch: int = 1) -> float:
        """Return the seconds of a pass of one row for each sequence of `cached` tokens.

        The larger of reading weights and KV, and of computing the rows.
        """
        reading = self.decode_s + batch * cached * self.decode_token_s
        return max(reading, batch * (self.row_s + self.pair_s * cached))

    def load_s(self, tokens: int, tier: str) -> float:
        """Return the seconds until KV of a tier is in the pool; an unknown tier takes forever."""
        if tier == MEMORY or tokens == 0:
            return 0.0
        rate = self.bytes_per_s.get(tier, ASSUMED_BYTES_PER_S.get(tier, 0.0))
        return math.inf if rate <= 0 else tokens * self.kv_bytes_per_token / rate

    def repair_s(self, rows: int, stale: int, cached: int, check_layer: int | None) -> float:
        """Return the seconds of computing some of a part's stale rows again.

        Args:
            rows: that are computed again.
            stale: rows of the part that are compared first.
            cached: tokens before the part.
            check_layer: at which they are compared; None compares nothing.
        """
        check = 0.0
        if check_layer is not None and 0 < rows < stale:
            check = self.prefill_s(stale, cached) * min(1.0, (check_layer + 1) / self.layers)
        if rows == 0:
            return 0.0
        # Chosen rows lie all over the part, so that on average they see half of it.
        seen = self.pair_s * rows * (cached + stale / 2)
        return check + self.pass_s + self.row_s * rows + seen

    def loading_wins(self, tokens: int, cached: int, tier: str) -> bool:
        """Whether loading KV of tokens behind cached ones is faster than computing it."""
        return self.load_s(tokens, tier) < self.prefill_s(tokens, cached)

    def hidden_share(self, tokens: int, tier: str) -> float:
        """Return the share of tokens that can be computed again while the others are loaded.

        Source: CacheBlend, section 5: the r at which r * prefill takes as long as the load.
        """
        prefill = self.prefill_s(tokens)
        return 0.0 if prefill <= 0 else min(1.0, self.load_s(tokens, tier) / prefill)

    def concurrency(self, tokens: int, free_bytes: float) -> int:
        """Return how many sequences of a length the memory beside the weights holds."""
        return math.floor(free_bytes / (self.kv_bytes_per_token * tokens)) if tokens else 0

    @property
    def critical_rows(self) -> float:
        """Rows of a pass above which computing takes longer than reading the weights."""
        return self.decode_s / self.row_s if self.row_s > 0 else math.inf

    def to_json(self) -> str:
        """Return the coefficients as JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Return what `to_json` wrote.

        Raises:
            ValueError: it is not such a text, or a coefficient is no finite number from 0.
        """
        found = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError("not the coefficients of a cost model")
        rates = found["bytes_per_s"]
        if not isinstance(rates, dict):
            raise ValueError("bytes_per_s holds no rates")
        optional = [] if found["error"] is None else [found["error"]]
        numbers = [found[name] for name in names - {"bytes_per_s", "error", "r2"}]
        for number in (*numbers, *rates.values(), *optional):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{number!r} is no number")
            if not 0 <= number < math.inf:
                raise ValueError(f"{number!r} is no coefficient")
        return cls(**found)


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured pass.

    Attributes:
        rows: that ran.
        cached: tokens before them.
        seconds: it took.
    """

    rows: int
    cached: int
    seconds: float


def fit_prefill(timings: Sequence[Timing]) -> tuple[float, float, float, float]:
    """Return (pass_s, row_s, pair_s, r2) of the least relative squares, none below zero.

    Every timing counts by its relative error, so that short passes are not drowned; R² is of the
    seconds themselves. A coefficient that would be negative is left out and the rest fitted again.
    """
    columns = np.array([[1.0, t.rows, t.rows * (t.cached + t.rows / 2)] for t in timings])
    seconds = np.array([t.seconds for t in timings])
    found = _non_negative(columns / seconds[:, None], np.ones(len(timings)))
    spread = float(np.square(seconds - seconds.mean()).sum())
    missed = float(np.square(seconds - columns @ found).sum())
    r2 = 1.0 - missed / spread if spread > 0 else 1.0
    pass_s, row_s, pair_s = (float(value) for value in found)
    return pass_s, row_s, pair_s, r2


def fit_decode(timings: Sequence[Timing]) -> tuple[float, float]:
    """Return (decode_s, decode_token_s) of passes of one row, none below zero."""
    columns = np.array([[1.0, t.cached] for t in timings])
    seconds = np.array([t.seconds for t in timings])
    decode_s, token_s = _non_negative(columns / seconds[:, None], np.ones(len(timings)))
    return float(decode_s), float(token_s)


def worst_error(model: CostModel, timings: Sequence[Timing]) -> float:
    """Return the largest relative error of the predicted prefill seconds."""
    errors = [abs(model.prefill_s(t.rows, t.cached) / t.seconds - 1) for t in timings]
    return max(errors, default=0.0)


def _non_negative(columns: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Solve a small least-squares problem with no coefficient below zero.

    By the definition: of all subsets of columns, the best whose solution is not negative.
    """
    count = columns.shape[1]
    best, least = np.zeros(count), float(np.square(goal).sum())
    for subset in range(1, 2**count):
        used = [column for column in range(count) if subset >> column & 1]
        found = np.zeros(count)
        found[used] = np.linalg.lstsq(columns[:, used], goal, rcond=None)[0]
        missed = float(np.square(goal - columns @ found).sum())
        if (found >= 0).all() and missed < least:
            best, least = found, missed
    return best
