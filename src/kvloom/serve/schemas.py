"""The bodies that clients send, as pydantic models.

Knows: field names, types and which values contradict each other.
Does not know: ranges of sampling values; `kvloom.params` checks those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from kvloom.outputs import Fidelity
from kvloom.params import MAX_LOGPROBS, SamplingParams
from kvloom.serve import unsupported
from kvloom.serve.content import Content, DocumentPart, Reusable, before_prompt, content_of
from kvloom.serve.unsupported import Harmless, refusal, without_harmless

MAX_STOPS = 64
MAX_DOCUMENTS = 64


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> list[str | list[int]]:
    if _is_text(value) or _are_ids(value):
        return [value]
    if isinstance(value, list) and value:
        prompts: list[str | list[int]] = value
        if all(map(_is_text, prompts)) or all(map(_are_ids, prompts)):
            return prompts
    raise refusal(
        None,
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; "
        "no list may be empty.",
    )


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _int_keys(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if not all(str(key).isdecimal() and len(key) < 20 for key in value):
        raise refusal(None, "logit_bias must map token ids to numbers.")
    return {int(key): bias for key, bias in value.items()}


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stops = Annotated[
    list[str],
    BeforeValidator(_texts, json_schema_input_type=str | list[str]),
    Field(max_length=MAX_STOPS),
]
CacheSalt = Annotated[str, Field(min_length=1)]
BeforePrompt = Annotated[
    Reusable, PlainValidator(before_prompt, json_schema_input_type=str | dict[str, str])
]
LogitBias = Annotated[
    dict[int, float], BeforeValidator(_int_keys, json_schema_input_type=dict[str, float])
]


class Body(BaseModel):
    """A JSON object without unknown fields, whose harmless unsupported fields are dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    harmless: ClassVar[Harmless] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_harmless(cls, fields: Any) -> Any:
        return without_harmless(fields, cls.harmless)


class StreamOptions(Body):
    """What a stream reports beside its text."""

    harmless: ClassVar[Harmless] = unsupported.STREAM_OPTIONS

    include_usage: bool | None = None


class KvloomOptions(Body):
    """What is asked of the KV behind an answer; even an empty object asks for the receipt."""

    fidelity: Fidelity | None = None
    planner: Literal["blend", "craft", "first", "none", "random"] | None = None
    share: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _check_repair(self) -> Self:
        if self.fidelity != "repaired" and (self.share, self.planner) != (None, None):
            name = "planner" if self.share is None else "share"
            raise refusal(name, f"{name} goes with the fidelity `repaired`.")
        return self


class SamplingBody(Body):
    """The fields that completions and chats share; null means the default.

    `user`, `metadata`, `safety_identifier` and `prompt_cache_key` are labels: they are accepted
    and change nothing (equal prefixes are reused without being named). `cache_salt` keeps the KV of
    a request from all that do not send the same.
    """

    model: str | None = None
    cache_salt: CacheSalt | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    kvloom: KvloomOptions | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: LogitBias | None = None
    max_tokens: int | None = None
    metadata: dict[str, Any] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    repetition_penalty: float | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: Stops | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    user: str | None = None

    sampling_fields: ClassVar[tuple[str, ...]] = (
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options needs stream to be true.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def fidelity(self) -> Fidelity | None:
        """The least that the KV of documents must be; None takes them as they are."""
        return None if self.kvloom is None else self.kvloom.fidelity

    def shared_sampling(self) -> dict[str, Any]:
        """Return the sampling fields that are set, under the names of `SamplingParams`."""
        fields = {name: getattr(self, name) for name in self.sampling_fields}
        if fields["top_k"] == -1:  # how vLLM writes "all"
            fields["top_k"] = 0
        return {name: value for name, value in fields.items() if value is not None}


class CompletionBody(SamplingBody):
    """Body of `POST /v1/completions`."""

    harmless: ClassVar[Harmless] = unsupported.COMPLETION

    prompt: Prompts | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None
    document: str | None = None
    documents: Annotated[list[BeforePrompt], Field(max_length=MAX_DOCUMENTS)] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise refusal("best_of", "best_of other than n is not supported yet; leave it out.")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "max_tokens may be 0 only with echo; ask for a token.")
        if self.document is not None and self.documents:
            raise refusal("documents", "Send either document or documents.")
        if self.prompt is None and not self.beginning:
            raise refusal("prompt", "prompt is missing; give a value.")
        if self.beginning and self.add_special_tokens:
            raise refusal(
                "add_special_tokens",
                "add_special_tokens goes before a text; behind a document there is no place for "
                "it.",
            )
        if self.suffix:
            self._check_suffix()
        return self

    def _check_suffix(self) -> None:
        if self.beginning:
            raise refusal("suffix", "suffix goes with a prompt, not with a document.")
        if self.echo:
            raise refusal("echo", "echo does not go with suffix; leave it out.")
        if not all(map(_is_text, self.prompts)):
            raise refusal("prompt", "With suffix, prompts must be texts.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts; behind a document none is as good as an empty one."""
        return [""] if self.prompt is None else self.prompt

    @property
    def beginning(self) -> list[Reusable]:
        """The documents and chunks that the prompts go on from."""
        if self.document is not None:
            return [DocumentPart(self.document)]
        return self.documents or []

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def only_echo(self) -> bool:
        """Whether the prompt alone is wanted back."""
        return self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """Return the engine's parameters.

        Raises:
            RequestError: a value is out of range.
        """
        fields = self.shared_sampling()
        if self.max_tokens is not None:
            # The engine always draws a token; a request for the echo alone drops it.
            fields["max_tokens"] = 1 if self.only_echo else self.max_tokens
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
            if self.echo:
                fields["prompt_logprobs"] = self.logprobs
        return SamplingParams(**fields)


class ChatMessage(Body):
    """One turn of a conversation; `developer` is another word for `system`."""

    harmless: ClassVar[Harmless] = unsupported.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Content, PlainValidator(content_of, json_schema_input_type=str | list[dict[str, str]])
    ]
    name: str | None = None

    def for_template(self, spelled: Callable[[Reusable], str]) -> dict[str, Any]:
        """Return the message as chat templates know it.

        Args:
            spelled: what stands in the place of a document or a chunk.
        """
        role = "system" if self.role == "developer" else self.role
        parts = [part if isinstance(part, str) else spelled(part) for part in self.content]
        message = {"role": role, "content": "\n".join(parts)}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(SamplingBody):
    """Body of `POST /v1/chat/completions`."""

    harmless: ClassVar[Harmless] = unsupported.CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise refusal("top_logprobs", "top_logprobs needs logprobs to be true.")
            if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
                raise refusal("top_logprobs", f"top_logprobs must be from 0 to {MAX_LOGPROBS}.")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise refusal(
                "max_completion_tokens",
                "max_tokens and max_completion_tokens are the same limit and differ; send one.",
            )
        return self

    def sampling_params(self) -> SamplingParams:
        """Return the engine's parameters; without a limit, generation may fill the context.

        Raises:
            RequestError: a value is out of range.
        """
        fields = self.shared_sampling()
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        fields["max_tokens"] = limit
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        return SamplingParams(**fields)


class TokenizeBody(Body):
    """Body of `POST /tokenize`: a prompt or a conversation."""

    harmless: ClassVar[Harmless] = unsupported.TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "Send either prompt or messages.")
        if self.messages is not None and self.add_special_tokens:
            raise refusal(
                "add_special_tokens",
                "add_special_tokens goes with prompt; a chat template brings its own.",
            )
        return self


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
