"""What a caller may ask of one generation: sampling, length and stopping.

Knows: the fields, their ranges and how they contradict each other.
Does not know: how a token is drawn (`kvloom.decode`) or what a model's vocabulary holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvloom.errors import RequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a generation ends.

    Attributes:
        n: completions per prompt; all share the prompt's document.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens with at least this probability mass.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability.
        seed: draws depend on the seed, the completion's index and the step only; None draws one.
        repetition_penalty: divides positive and multiplies negative logits of seen tokens.
        presence_penalty: subtracted once from every token generated before.
        frequency_penalty: subtracted per earlier occurrence in the output.
        logit_bias: added to the logits of these token ids before anything else.
        logprobs: alternatives reported per generated token; None reports nothing.
        prompt_logprobs: alternatives reported per prompt token; None reports nothing.
        max_tokens: tokens generated at most; None generates up to the model's context.
        min_tokens: no stop condition and no end-of-text token before this many tokens.
        stop: strings that end the text; they are not part of it unless asked for.
        stop_token_ids: token ids that end the text.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: go on after the model's end-of-text token.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value is out of range or not a number; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop: object = self.stop
        stops = (stop,) if isinstance(stop, str) else _items("stop", stop)
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping | None):
            raise RequestError("logit_bias must map token ids to numbers.", param="logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_numbers()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        """Whether every draw is the most likely token."""
        return self.temperature == 0.0

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, 128)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, 0, 2**31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31)
            _number("logit_bias", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError("Every stop string must be a text that is not empty.", param="stop")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31)


def _items(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {value!r}; it must be a list.", param=name)
    return tuple(value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"{name} is {value!r}; it must be an integer from {low} to {high}.", param=name
        )


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise RequestError(f"{name} is {value!r}; it must be from {low} to {high}.", param=name)
    if open_low and value == low:
        raise RequestError(f"{name} is {value!r}; it must be above {low}.", param=name)
