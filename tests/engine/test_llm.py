"""`LLM` over the fake model for its laws, and over a tiny real one for its numbers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvloom import LLM, RequestError, SamplingParams
from kvloom.errors import CapacityError, KvloomError
from tests.engine.worlds import BOOKS, TOKENIZER, expected_completion, greedy
from tests.fake_model import FakeRunner, Oracle

Make = Callable[..., LLM]
FOREVER = greedy(max_tokens=3000, ignore_eos=True)


def is_idle(llm: LLM) -> bool:
    """Whether nothing runs or waits and nobody's mailbox is kept; behind all asked so far."""
    stats = llm.stats()
    return (stats.running, stats.waiting, len(llm.loop._mailboxes)) == (0, 0, 0)


def test_prompts_keep_their_order_and_their_parameters(make_llm: Make) -> None:
    llm = make_llm(max_running=3, step_tokens=16)
    prompts = [book[:length] for length in (40, 3, 90) for book in BOOKS]
    wanted = [SamplingParams(max_tokens=1 + i, seed=i, n=1 + i % 2) for i in range(9)]
    outputs = llm.generate(prompts, wanted, progress=True)
    for prompt, params, output in zip(prompts, wanted, outputs, strict=True):
        assert list(output.prompt_token_ids) == prompt
        for index, completion in enumerate(output.outputs):
            tokens, reason, stop = expected_completion(Oracle(), prompt, params, index, 3000)
            assert completion.index == index
            assert list(completion.token_ids) == tokens
            assert (completion.finish_reason, completion.stop_reason) == (reason, stop)
    assert is_idle(llm)


def test_text_ids_and_chats_are_prompts_alike(make_llm: Make) -> None:
    llm = make_llm()
    text = "what is a cache"
    by_text, by_ids = llm.generate([text, TOKENIZER.encode(text)], greedy())
    assert by_text.outputs[0].text == by_ids.outputs[0].text
    assert (by_text.prompt, by_ids.prompt) == (text, None)
    chat = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(chat, greedy())
    two = llm.chat([chat, chat], greedy())
    assert one.prompt == "user: hi\n"
    assert [o.outputs[0].token_ids for o in two] == [one.outputs[0].token_ids] * 2
    streamed = "".join(chunk.text for chunk in llm.stream_chat(chat, greedy()))
    assert streamed == one.outputs[0].text
    assert llm.generate([]) == []


def test_log_probabilities_add_up(make_llm: Make) -> None:
    (output,) = make_llm().generate(BOOKS[0][:20], greedy(5, logprobs=2, prompt_logprobs=1))
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert completion.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
    )
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 20


def test_more_prompts_than_may_wait(make_llm: Make) -> None:
    llm = make_llm(max_running=2, max_waiting=1)
    outputs = llm.generate([[1 + i] for i in range(20)], greedy(3, ignore_eos=True))
    assert [output.prompt_token_ids[0] for output in outputs] == list(range(1, 21))
    others = [llm.stream([token], FOREVER) for token in (1, 2, 3)]
    with pytest.raises(CapacityError) as refused:
        llm.generate([5], greedy())
    assert refused.value.retry_after_s is not None
    del others
    gc.collect()
    assert is_idle(llm)


def test_all_prompts_of_a_call_run_in_one_step(make_llm: Make) -> None:
    runner = FakeRunner()
    make_llm(runner=runner, enable_prefix_caching=False).generate(
        [[1 + i] for i in range(9)], greedy(1)
    )
    assert runner.steps == [[1] * 9]


@pytest.mark.parametrize(
    "prompts",
    [
        "",
        [[]],
        [[1], []],
        [99],
        [-1],
        [True, False],
        [1.5],
        [None],
        [[1], None],
        ["a", 3],
        5,
        None,
        b"abc",
        [b"abc"],
        {"prompt": "a"},
        [1] * 64 * 4,
    ],
)
def test_a_wrong_prompt_is_named_and_nothing_is_generated(make_llm: Make, prompts: Any) -> None:
    llm = make_llm(blocks=4)
    with pytest.raises(RequestError) as refused:
        llm.generate(prompts, greedy())
    assert refused.value.param == "prompt"
    assert llm.stats().generated_tokens == 0
    assert is_idle(llm)


@pytest.mark.parametrize("params", [5, {"temperature": 1}, [greedy(), greedy()], ["x"], [None]])
def test_wrong_parameters_are_named(make_llm: Make, params: Any) -> None:
    llm = make_llm()
    with pytest.raises(RequestError) as refused:
        llm.generate([1], params)
    assert refused.value.param == "params"
    assert is_idle(llm)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", float("nan")),
        ("top_p", 0.0),
        ("min_p", float("inf")),
        ("presence_penalty", float("nan")),
        ("n", 0),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("stop", 5),
        ("stop", [""]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1.5]),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: float("nan")}),
        ("seed", 2**64),
        ("logprobs", 21),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_a_stream_that_is_left_ends_its_request(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    unread = llm.stream(BOOKS[0][:100], FOREVER)
    unread.close()  # type: ignore[attr-defined]
    assert is_idle(llm)
    read = llm.stream(BOOKS[0][:100], FOREVER)
    for _ in range(3):
        assert next(read).token_ids
    assert llm.stats().running == 1
    del read
    gc.collect()
    assert is_idle(llm)
    assert llm.stats().kv_bytes_used == 0


def test_an_interrupt_cancels_the_rest(make_llm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(enable_prefix_caching=False)
    from kvloom.engine.batch import Batch

    taken = []

    def interrupted(self: Batch, event: object) -> bool:
        taken.append(event)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return take(self, event)  # type: ignore[arg-type]

    take = Batch.take
    monkeypatch.setattr(Batch, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([book[:9] for book in BOOKS], FOREVER)
    assert is_idle(llm)
    assert llm.stats().kv_bytes_used == 0


def test_a_failed_step_is_raised_and_the_next_call_works(make_llm: Make) -> None:
    runner = FakeRunner()
    llm = make_llm(runner=runner)
    runner.failures = [MemoryError("no memory for activations")]
    with pytest.raises(KvloomError, match="no memory for activations"):
        llm.generate([[1], [2]], greedy())
    assert is_idle(llm)
    assert len(llm.generate([[1], [2]], greedy())) == 2


def test_a_closed_engine_says_so(make_llm: Make) -> None:
    llm = make_llm()
    chunks = llm.stream(BOOKS[0][:9], FOREVER)
    next(chunks)
    with llm:
        pass
    with pytest.raises(KvloomError, match="closed"):
        list(chunks)
    for call in (llm.stats, lambda: llm.generate([1]), lambda: llm.stream([1])):
        with pytest.raises(KvloomError, match="closed"):
            call()
    llm.close()


def test_a_forgotten_engine_ends_its_thread(make_llm: Make, tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), kv_memory="1MiB")
    thread = llm.loop._thread
    del llm
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(tiny_llm: LLM, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    prompts = [tiny_llm.tokenizer.encode(text) for text in ("def add(", "The quick", "日本")]
    outputs = tiny_llm.generate(prompts, greedy(12, ignore_eos=True, prompt_logprobs=0))
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.outputs
        tokens = [*prompt, *completion.token_ids]
        logits = model(torch.tensor([tokens])).logits[0]
        for place, token in enumerate(completion.token_ids, start=len(prompt) - 1):
            assert float(logits[place].max() - logits[place, token]) < 1e-3
        assert output.prompt_logprobs is not None
        scores = logits.log_softmax(-1)
        for place, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            token = prompt[place + 1]
            assert entry[token].logprob == pytest.approx(float(scores[place, token]), abs=1e-4)
