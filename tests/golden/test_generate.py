"""Greedy output of the embedded model against transformers.generate in fp32, on real text.

Knows: real prompts, and how close two logits must be for rounding to decide between them.
Does not know: how kvloom computes.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvloom import LLM, SamplingParams
from tests.tolerances import TOLERANCE

MARGIN = TOLERANCE["float32"]["best two logits"]
MODULES = (
    "argparse",
    "heapq",
    "textwrap",
    "statistics",
    "shlex",
    "bisect",
    "fractions",
    "calendar",
)
# Tokens of the prompts, from 100 to 3,000.
LENGTHS = (100, 116, 135, 157, 182, 211, 246, 285, 331, 385, 447, 520, 604, 702, 900, 1200, 1600)
LONG_LENGTHS = (2100, 2600, 3000)


@dataclass(frozen=True)
class Reference:
    """What transformers generates, and how far its second best logit was behind at each step."""

    tokens: list[int]
    margins: list[float]


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(
        str(default_model_path), dtype="float32", kv_memory="2GiB", enable_prefix_caching=False
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model(default_model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.float32).eval()


def source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def function_heads(module: str) -> list[str]:
    """Functions of a module up to the end of their docstring, as HumanEval shows them."""
    text = source(module)
    lines = text.splitlines(keepends=True)
    heads = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            heads.append("".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
    return heads


def cut_sources(llm: LLM, lengths: Sequence[int]) -> list[list[int]]:
    """Beginnings of modules of the standard library, of so many tokens."""
    prompts = []
    for number, length in enumerate(lengths):
        tokens = llm.tokenizer.encode(source(MODULES[number % len(MODULES)]))
        prompts.append(tokens[:length])
        assert len(prompts[-1]) == length
    return prompts


def reference(model: Any, prompt: list[int], max_tokens: int) -> Reference:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=max_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [row[0].topk(2).values for row in output.logits]
    margins = [float(first - second) for first, second in best]
    return Reference(output.sequences[0, len(prompt) :].tolist(), margins)


def check_equal(reference: Reference, tokens: Sequence[int]) -> bool:
    """Check tokens up to where rounding may decide; return whether all are equal."""
    for place, expected in enumerate(reference.tokens):
        if place >= len(tokens) or tokens[place] != expected:
            assert reference.margins[place] < MARGIN, (
                f"token {place} differs: {tokens[place : place + 1]} for {expected}, which "
                f"transformers prefers by {reference.margins[place]}"
            )
            return False
    assert len(tokens) == len(reference.tokens)
    return True


def check_all(llm: LLM, model: Any, prompts: list[list[int]], max_tokens: int) -> None:
    """Check prompts alone and packed together; print how often rounding decided."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    packed = llm.generate(prompts, params)
    differ = 0
    for prompt, one, other in zip(prompts, alone, packed, strict=True):
        expected = reference(model, prompt, max_tokens)
        for output in (one, other):
            differ += not check_equal(expected, output.outputs[0].token_ids)
    print(
        f"\n{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"{max_tokens} tokens each, alone and packed: {differ} of {2 * len(prompts)} outputs "
        f"differ, where the two best logits are closer than {MARGIN}."
    )


def test_three_short_prompts(llm: LLM, model: Any) -> None:
    heads = [llm.tokenizer.encode(head) for head in function_heads("heapq")]
    head = min((head for head in heads if len(head) >= 100), key=len)
    check_all(llm, model, [*cut_sources(llm, [100, 140]), head], 10)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_sources_of_the_standard_library(llm: LLM, model: Any) -> None:
    check_all(llm, model, cut_sources(llm, (*LENGTHS, *LONG_LENGTHS)), 64)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_function_heads_of_the_standard_library(llm: LLM, model: Any) -> None:
    heads = [
        head for module in ("heapq", "textwrap", "statistics") for head in function_heads(module)
    ]
    prompts = [llm.tokenizer.encode(head) for head in heads]
    prompts = [prompt for prompt in prompts if len(prompt) >= 100][:10]
    assert len(prompts) == 10
    check_all(llm, model, prompts, 64)


@pytest.mark.long
@pytest.mark.shared_data
@pytest.mark.timeout(600)
def test_human_eval(llm: LLM, model: Any, shared_data: Path) -> None:
    with gzip.open(shared_data / "HumanEval.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line in file]
    prompts = [llm.tokenizer.encode(task["prompt"]) for task in tasks]
    prompts = [prompt for prompt in prompts if len(prompt) >= 100][::4][:20]
    assert len(prompts) == 20
    check_all(llm, model, prompts, 64)
