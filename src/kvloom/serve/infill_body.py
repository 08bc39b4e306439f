"""The body of `/infill`, as llama.cpp's server and the editors that speak to it know it.

Knows: its fields, defaults and how they read in our own parameters.
Does not know: prompts or replies.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, model_validator

from kvloom.params import SamplingParams
from kvloom.serve.infill import ExtraText, Gap
from kvloom.serve.schemas import Body, CacheSalt, KvloomOptions, Stops
from kvloom.serve.unsupported import INFILL, Harmless, refusal

T = TypeVar("T")
MAX_EXTRAS = 1000
# What editors send to make an answer faster or tidier; an answer is one without them.
HINTS = ("cache_prompt", "n_indent", "samplers", "t_max_predict_ms", "t_max_prompt_ms")


class ExtraBody(Body):
    """Another text that may help."""

    filename: str = ""
    text: str
    time: Any = None


class InfillBody(Body):
    """Body of `POST /infill`; null means the default.

    Defaults are those of llama.cpp's server. Hints that change nothing here are named in the
    reply.
    """

    harmless: ClassVar[Harmless] = INFILL

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[ExtraBody], Field(max_length=MAX_EXTRAS)] | None = None
    prompt: str | None = None
    n_predict: int | None = None
    model: str | None = None
    cache_salt: CacheSalt | None = None
    kvloom: KvloomOptions | None = None
    stream: bool | None = None
    stop: Stops | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    return_tokens: bool | None = None
    response_fields: list[str] | None = None
    cache_prompt: bool | None = None
    n_indent: int | None = None
    samplers: list[str] | None = None
    t_max_predict_ms: int | None = None
    t_max_prompt_ms: int | None = None

    @model_validator(mode="after")
    def _check_limit(self) -> Self:
        if self.n_predict is not None and self.n_predict < -1:
            raise refusal("n_predict", "n_predict must be -1 (no limit), 0 or more.")
        return self

    @property
    def gap(self) -> Gap:
        """What stands around the text that is asked for."""
        extras = tuple(ExtraText(each.filename, each.text) for each in self.input_extra or ())
        return Gap(self.input_prefix, self.input_suffix, self.prompt or "", extras)

    @property
    def only_prompt(self) -> bool:
        """Whether the prompt is to be read and nothing generated."""
        return self.n_predict == 0

    @property
    def ignored(self) -> tuple[str, ...]:
        """The hints that were given and change nothing."""
        given = {name for name in HINTS if getattr(self, name) is not None}
        return tuple(sorted(given - ({"cache_prompt"} if self.cache_prompt else set())))

    def sampling_params(self, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """Return the engine's parameters.

        Raises:
            RequestError: a value is out of range.
        """
        limit = None if self.n_predict in (None, -1) else self.n_predict
        return SamplingParams(
            # The engine always draws a token; a request for the prompt alone drops it.
            max_tokens=1 if self.only_prompt else limit,
            temperature=_given(self.temperature, 0.8),
            top_k=max(0, _given(self.top_k, 40)),
            top_p=_given(self.top_p, 0.95),
            min_p=_given(self.min_p, 0.05),
            repetition_penalty=_given(self.repeat_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            seed=None if self.seed == -1 else self.seed,
            stop=tuple(self.stop or ()),
            stop_token_ids=() if self.ignore_eos else stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
        )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
