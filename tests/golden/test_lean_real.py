"""The embedded model as it runs by default, against its file's own weights in fp32 on the seam.

Knows: real source code and prompts, and how far the default formats may be from fp32.
Does not know: how either runner computes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import LLM, SamplingParams
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes, blocks_for
from kvloom.model.open import OpenedModel, OpenOptions, open_model
from kvloom.types import Rows
from tests.golden.test_generate import function_heads, source
from tests.tolerances import TOLERANCE

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
NEAR = TOLERANCE["default model"]


@pytest.fixture(scope="module", params=["auto", "int8"])
def lean(request: pytest.FixtureRequest) -> OpenedModel:
    model = open_model("default", OpenOptions(kv_dtype=request.param))
    assert model.passport.formats.kv == ("int8" if request.param == "int8" else "bfloat16")
    assert model.runner_name.startswith("lean"), model.runner_note
    return model


@pytest.fixture(scope="module")
def reference() -> OpenedModel:
    model = open_model("default", OpenOptions(dtype="float32"))
    assert model.runner_name == "seam"
    return model


@torch.inference_mode()
def logits(model: OpenedModel, tokens: list[int], chunk: int = 300) -> Tensor:
    layers = model.runner.spec.layers
    size = (blocks_for(len(tokens)) + 1) * block_bytes(layers, model.kv_dtype)
    pool = Pool(layers, size, model.kv_dtype, layout=model.layout)
    doc, parts = KVDoc(pool, Lineage.root(b"real")), []
    for start in range(0, len(tokens), chunk):
        ids = np.array(tokens[start : start + chunk], dtype=np.int64)
        pos = np.arange(start, start + len(ids), dtype=np.int64)
        (found,) = model.runner.forward([Rows(doc, ids, pos, "all")]).logits
        assert found is not None
        parts.append(found)
    return torch.cat(parts)


def compare(lean: OpenedModel, reference: OpenedModel, texts: list[list[int]]) -> None:
    """Check the likelihood of texts and the most likely tokens, and print both."""
    mine, theirs, equal, count = 0.0, 0.0, 0, 0
    for tokens in texts:
        found, expected = (logits(m, tokens).log_softmax(-1) for m in (lean, reference))
        targets = torch.tensor(tokens[1:])[:, None]
        mine -= float(found[:-1].gather(1, targets).sum())
        theirs -= float(expected[:-1].gather(1, targets).sum())
        equal += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += len(tokens)
    agreement = equal / count
    print(
        f"\n{count} tokens: likelihood {mine / count:.4f} for {theirs / count:.4f} in fp32 "
        f"({mine / theirs - 1:+.2%}), the same best token at {agreement:.1%} (aim 97 %)."
    )
    assert abs(mine / theirs - 1) <= NEAR["likelihood"]
    assert agreement >= NEAR["agreement"]


def test_source_code_is_as_likely_as_in_fp32(lean: OpenedModel, reference: OpenedModel) -> None:
    modules = ("heapq", "textwrap", "shlex", "bisect")
    compare(lean, reference, [lean.tokenizer.encode(source(name))[:500] for name in modules])


@pytest.mark.shared_data
def test_human_eval_is_as_likely_as_in_fp32(
    lean: OpenedModel, reference: OpenedModel, shared_data: Path
) -> None:
    with gzip.open(shared_data / "HumanEval.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line in file][::12]
    compare(lean, reference, [lean.tokenizer.encode(task["prompt"]) for task in tasks])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(kv_memory="512MiB") as made:
        yield made


def test_greedy_answers_beside_those_in_fp32(llm: LLM) -> None:
    heads = [head for module in ("heapq", "textwrap") for head in function_heads(module)]
    prompts = [llm.tokenizer.encode(head) for head in heads][:10]
    assert len(prompts) == 10
    params = SamplingParams(temperature=0.0, max_tokens=24)
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(dtype="float32", kv_memory="512MiB") as exact:
        expected = [output.outputs[0].token_ids for output in exact.generate(prompts, params)]
    same = sum(list(x) == list(y) for x, y in zip(found, expected, strict=True))
    first = sum(x[0] == y[0] for x, y in zip(found, expected, strict=True))
    print(f"\n{same} of 10 greedy answers of 24 tokens are those in fp32; {first} begin alike.")
    assert all(0 < len(tokens) <= 24 for tokens in found)
    assert first >= 8


def test_a_shared_prefix_is_reused(llm: LLM) -> None:
    stem = llm.tokenizer.encode(source("bisect"))[:260]
    ends = [llm.tokenizer.encode(text) for text in ("\n# Summary:", "\ndef main():")]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    first = llm.generate(stem + ends[0], params)[0]
    second = llm.generate(stem + ends[1], params)[0]
    assert second.usage.cached_tokens >= 256
    assert first.usage.cached_tokens < 256
    with LLM(kv_memory="512MiB", enable_prefix_caching=False) as fresh:
        alone = fresh.generate(stem + ends[1], params)[0]
    assert alone.usage.cached_tokens == 0
    assert alone.outputs[0].token_ids == second.outputs[0].token_ids
