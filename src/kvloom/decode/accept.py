"""One generation from its first token to its last: what each token adds, and when it is over.

Knows: text, stop conditions and the sampler's memory of one completion.
Does not know: KV memory; a preempted generation goes on with the same state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.decode.detokenize import Detokenizer, TextDecoder
from kvloom.decode.draw import Draw
from kvloom.decode.state import DrawKey, SamplingState
from kvloom.decode.stop import Finish, StopText, finish_by_token
from kvloom.errors import KvloomError
from kvloom.outputs import CompletionOutput, FinishReason, TokenLogprobs
from kvloom.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Emission:
    """What one token added to a completion.

    Attributes:
        text: text that can no longer change; may be empty.
        token_ids: tokens that were added.
        logprobs: per added token, if asked for.
        finish_reason: set when the generation is over.
        stop_reason: the stop string or token id that ended it.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class GenerationState:
    """All that one completion remembers besides its KV.

    Attributes:
        params: what the caller asked for.
        sampling: the sampler's memory; what `draw` reads.
        token_ids: tokens generated so far; replayed after the prompt when the KV was lost.
        finish: why it is over; None while it runs.
    """

    def __init__(
        self,
        params: SamplingParams,
        decoder: TextDecoder,
        prompt_tokens: Sequence[int],
        *,
        max_tokens: int,
        key: DrawKey,
    ) -> None:
        """Begin a completion.

        Args:
            params: what the caller asked for.
            decoder: the tokenizer, probed.
            prompt_tokens: the text goes on where theirs ends.
            max_tokens: tokens at most, the model's context considered.
            key: what its draws depend on.
        """
        eos_token_ids = decoder.tokenizer.eos_token_ids
        self.params = params
        self.sampling = SamplingState(params, prompt_tokens, key=key, eos_token_ids=eos_token_ids)
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self._eos_token_ids = eos_token_ids
        self._max_tokens = max_tokens
        self._detokenizer = Detokenizer(
            decoder, skip_special_tokens=params.skip_special_tokens, context=prompt_tokens
        )
        self._stop_text = StopText(params.stop, include_stop=params.include_stop_str_in_output)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    def accept(self, drawn: Draw) -> Emission:
        """Take the next token and return what it adds.

        Raises:
            KvloomError: the generation is over, or log-probabilities were asked for and not given.
        """
        self._check_accepts(drawn)
        token_id = drawn.token_id
        self.token_ids.append(token_id)
        self.sampling.record(token_id)
        if drawn.logprobs is not None:
            self._logprobs.append(drawn.logprobs)
        finish = finish_by_token(self.params, token_id, len(self.token_ids), self._eos_token_ids)
        if finish is None or self.params.include_stop_str_in_output:
            text, stop = self._scan(self._detokenizer.push(token_id))
        else:
            text, stop = "", None
        if finish is None and len(self.token_ids) >= self._max_tokens:
            finish = Finish("length")
        return self._emit(text, stop, finish, drawn)

    def abort(self) -> Emission:
        """End the generation now and return the text that was held back."""
        if self.finish is not None:
            raise KvloomError("The generation is over already; it cannot be aborted.")
        return self._emit("", None, Finish("abort"), None)

    @property
    def text(self) -> str:
        """The text shown so far."""
        return "".join(self._pieces)

    def output(self) -> CompletionOutput:
        """Return the completion as it is now."""
        wanted = self.params.logprobs is not None
        chosen = [
            entries[token_id].logprob
            for token_id, entries in zip(self.token_ids, self._logprobs, strict=wanted)
        ]
        return CompletionOutput(
            index=self.sampling.key.completion,
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish.reason if self.finish else None,
            stop_reason=self.finish.stop_reason if self.finish else None,
            logprobs=tuple(self._logprobs) if wanted else None,
            cumulative_logprob=math.fsum(chosen) if wanted else None,
        )

    def _check_accepts(self, drawn: Draw) -> None:
        if self.finish is not None:
            raise KvloomError("The generation is over already; it takes no further token.")
        if self.params.logprobs is not None and drawn.logprobs is None:
            raise KvloomError("The token came without the log-probabilities that were asked for.")

    def _scan(self, piece: str) -> tuple[str, str | None]:
        may_stop = len(self.token_ids) >= self.params.min_tokens
        text, stop = self._stop_text.feed(piece, may_stop=may_stop)
        # A held byte run that spells a stop string is final, because nothing will follow it.
        if (
            stop is None
            and may_stop
            and self.params.stop
            and self._stop_text.finds(self._detokenizer.preview())
        ):
            more, stop = self._stop_text.feed(self._detokenizer.flush())
            text += more
        return text, stop

    def _emit(
        self, text: str, stop: str | None, finish: Finish | None, drawn: Draw | None
    ) -> Emission:
        if stop is None and finish is not None:
            may_stop = finish.reason != "abort" and len(self.token_ids) >= self.params.min_tokens
            more, stop = self._stop_text.feed(self._detokenizer.flush(), may_stop=may_stop)
            text += more
            if stop is None:
                text += self._stop_text.flush()
        self.finish = Finish("stop", stop) if stop is not None else finish
        self._pieces.append(text)
        return Emission(
            text=text,
            token_ids=() if drawn is None else (drawn.token_id,),
            logprobs=None if drawn is None or drawn.logprobs is None else (drawn.logprobs,),
            finish_reason=self.finish.reason if self.finish else None,
            stop_reason=self.finish.stop_reason if self.finish else None,
        )
