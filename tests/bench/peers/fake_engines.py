"""Stand-ins for the modules of engines that are not installed here.

Each generates by one rule, so that a worker is right if it hands over the whole context: the next
token is the sum of all before it, modulo the size of the vocabulary.
"""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

VOCABULARY = 997


def next_token(context: list[int]) -> int:
    return sum(context) % VOCABULARY


def greedy(prompt: list[int], new_tokens: int) -> list[int]:
    """Return what every engine must generate."""
    context = list(prompt)
    for _ in range(new_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


class FakeLlama:
    """llama.cpp's functions over sequences of tokens by position; counts what it computes."""

    def __init__(self, batch_tokens: int = 4) -> None:
        self.sequences: dict[int, dict[int, int]] = {}
        self.computed = 0
        self.batch_tokens = batch_tokens
        self.params = SimpleNamespace(n_threads=0)
        self.status = 0
        self.rows: list[Any] = []

    def module(self) -> ModuleType:
        return module(
            "llama_cpp",
            __version__="0",
            llama_backend_init=lambda: None,
            llama_model_default_params=lambda: None,
            llama_model_load_from_file=lambda path, params: b"gguf" in path,
            llama_context_default_params=lambda: self.params,
            llama_init_from_model=lambda model, params: "context",
            llama_get_memory=lambda context: "memory",
            llama_n_batch=lambda context: self.batch_tokens,
            llama_batch_init=self.batch,
            llama_model_get_vocab=lambda model: "vocabulary",
            llama_vocab_n_tokens=lambda vocabulary: VOCABULARY,
            llama_model_desc=self.describe,
            llama_memory_seq_rm=self.remove,
            llama_memory_seq_cp=self.copy,
            llama_memory_seq_add=self.move,
            llama_memory_clear=lambda memory, data: self.sequences.clear(),
            llama_decode=self.decode,
            llama_get_logits_ith=self.logits,
        )

    def batch(self, size: int, _embedding: int, _sequences: int) -> Any:
        names = ("token", "pos", "n_seq_id", "logits")
        columns = {name: [0] * size for name in names}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(size)], **columns)

    def describe(self, _model: Any, text: Any, _size: int) -> None:
        text.value = b"toy Q4_1"

    def remove(self, _memory: Any, sequence: int, start: int, end: int) -> None:
        for at in self.between(sequence, start, end):
            del self.sequences[sequence][at]

    def copy(self, _memory: Any, source: int, target: int, start: int, end: int) -> None:
        found = {at: self.sequences[source][at] for at in self.between(source, start, end)}
        self.sequences.setdefault(target, {}).update(found)

    def move(self, _memory: Any, sequence: int, start: int, end: int, by: int) -> None:
        moved = {at: self.sequences[sequence].pop(at) for at in self.between(sequence, start, end)}
        self.sequences[sequence] |= {at + by: token for at, token in moved.items()}

    def between(self, sequence: int, start: int, end: int) -> list[int]:
        held = self.sequences.setdefault(sequence, {})
        return [at for at in held if at >= start and (end < 0 or at < end)]

    def decode(self, _context: Any, batch: Any) -> int:
        self.rows = []
        for row in range(batch.n_tokens):
            context = self.sequences.setdefault(batch.seq_id[row][0], {})
            # As the library asks for: a batch goes on where its sequence ends.
            assert batch.pos[row] == max(context, default=-1) + 1
            context[batch.pos[row]] = batch.token[row]
            assert sorted(context) == list(range(len(context))) or not batch.logits[row]
            self.rows.append(list(context.values()) if batch.logits[row] else None)
        self.computed += batch.n_tokens
        return self.status

    def logits(self, _context: Any, row: int) -> Any:
        values = (ctypes.c_float * VOCABULARY)()
        values[next_token(self.rows[row])] = 1.0
        return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))


class FakePipeline:
    """OpenVINO's pipeline: one token per request and step."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings
        self.running: list[Any] = []

    def add_request(self, _number: int, tokens: Any, config: Any) -> Any:
        assert config.ignore_eos
        assert not config.do_sample
        handle = SimpleNamespace(context=tokens.tolist()[0], left=config.max_new_tokens, fresh=[])
        handle.can_read = lambda: bool(handle.fresh)
        handle.read = lambda: {0: SimpleNamespace(generated_ids=[handle.fresh.pop()])}
        self.running.append(handle)
        return handle

    def has_non_finished_requests(self) -> bool:
        return any(handle.left for handle in self.running)

    def step(self) -> None:
        for handle in self.running:
            if handle.left:
                handle.fresh.append(next_token(handle.context))
                handle.context.append(handle.fresh[-1])
                handle.left -= 1


def openvino_modules() -> dict[str, ModuleType]:
    return {
        "openvino": module("openvino", Tensor=lambda array: array, get_version=lambda: "1.2-x"),
        "openvino_genai": module(
            "openvino_genai",
            __version__="1.2.3-y",
            SchedulerConfig=SimpleNamespace,
            GenerationConfig=SimpleNamespace,
            ContinuousBatchingPipeline=FakePipeline,
        ),
    }


class FakeGenerator:
    """ONNX Runtime's generator, which takes padding on the right off each row."""

    computed = 0

    def __init__(self, model: Any, params: Any) -> None:
        self.pad = model.changes["pad_token_id"]
        self.rows: list[list[int]] = [[] for _ in range(params.options["batch_size"])]
        self.longest = params.options["max_length"]

    def append_tokens(self, tokens: Any) -> None:
        assert tokens.dtype == np.int32
        assert tokens.size
        for row, added in zip(self.rows, tokens.tolist(), strict=True):
            row += [token for token in added if token != self.pad]
            type(self).computed += len(added)
            assert len(row) <= self.longest

    def rewind_to(self, length: int) -> None:
        self.rows = [row[:length] for row in self.rows]

    def generate_next_token(self) -> None:
        for row in self.rows:
            row.append(next_token(row))

    def get_next_tokens(self) -> Any:
        return np.array([row[-1] for row in self.rows])


class FakeOnnxConfig:
    def __init__(self, folder: str) -> None:
        self.changes: dict[str, Any] = {}

    def overlay(self, text: str) -> None:
        import json

        self.changes |= json.loads(text)["model"]


class FakeOnnxParams:
    def __init__(self, model: Any) -> None:
        self.options: dict[str, Any] = {}

    def set_search_options(self, **options: Any) -> None:
        self.options |= options


def onnxruntime_module() -> ModuleType:
    return module(
        "onnxruntime_genai",
        __version__="0",
        Config=FakeOnnxConfig,
        Model=lambda config: config,
        GeneratorParams=FakeOnnxParams,
        Generator=FakeGenerator,
    )


class FakeVllmEngine:
    """vLLM's engine: all prompts of equal standing, one token per step."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        assert name not in self.running
        assert params.ignore_eos
        self.running[name] = [list(prompt["prompt_token_ids"]), [], params.max_tokens]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        outputs = []
        for name, (context, tokens, most) in list(self.running.items()):
            tokens.append(next_token([*context, *tokens]))
            finished = len(tokens) == most
            outputs.append(
                SimpleNamespace(
                    request_id=name,
                    outputs=[SimpleNamespace(token_ids=tuple(tokens))],
                    finished=finished,
                    num_cached_tokens=None if len(context) < 4 else 4,
                )
            )
            if finished:
                del self.running[name]
        return outputs


class FakeVllm:
    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def make(self, **settings: Any) -> Any:
        self.settings = settings
        return SimpleNamespace(llm_engine=FakeVllmEngine())

    def module(self) -> ModuleType:
        return module("vllm", __version__="0", LLM=self.make, SamplingParams=SimpleNamespace)


class FakeCTranslate2:
    """CTranslate2's generator over words that are the token ids in letters."""

    compute_type = "int8_float32"

    def __init__(self, folder: str, **settings: Any) -> None:
        self.settings = settings
        self.static: list[tuple[str, ...] | None] = []

    def generate_batch(self, prompts: list[list[str]], **options: Any) -> list[Any]:
        assert options["end_token"] == []
        assert options["cache_static_prompt"] == bool(options["static_prompt"])
        self.static.append(options["static_prompt"])
        start = options["static_prompt"] or []
        results = []
        for prompt in prompts:
            context = [int(word[1:]) for word in (*start, *prompt)]
            tokens = greedy(context, options["max_length"])
            results.append(SimpleNamespace(sequences_ids=[tokens]))
        for _ in range(options["max_length"]):
            assert options["callback"](None) is False
        return results


def ctranslate2_module() -> ModuleType:
    return module("ctranslate2", __version__="0", Generator=FakeCTranslate2)
