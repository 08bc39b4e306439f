"""Eight passages of real text in new order, on the embedded model in fp32: error and time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch

from kvloom import LLM, Document, SamplingParams
from kvloom.engine.joining import TokenPart
from kvloom.engine.parts import join_tokens
from kvloom.outputs import Fidelity
from tests.golden.test_generate import source

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
MODULES = ("argparse", "heapq", "textwrap", "statistics", "shlex", "fractions", "calendar", "queue")
SYSTEM = "# Parts of Python's standard library.\n"
QUESTIONS = (
    "\n\n# A function that sorts a list with the heap above:\ndef",
    "\n\n# Usage: parse the arguments of a command line with the parser above.\n",
    "\n\n# The module that prints a month as text is called",
    "\n\nclass Test",
)
CHUNK, NEXT = 512, 24


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", kv_memory="3GiB", repair_when_idle=False) as made:
        yield made


def passages(llm: LLM) -> list[TokenPart]:
    """The first 512 tokens behind the head of each module's source."""
    found = []
    for name in MODULES:
        tokens = llm.tokenizer.encode(source(name), add_special_tokens=False)
        found.append(TokenPart(tuple(tokens[100 : 100 + CHUNK]), reusable=True))
    return found


def text_part(llm: LLM, text: str, *, first: bool = False) -> TokenPart:
    return TokenPart(tuple(llm.tokenizer.encode(text, add_special_tokens=first)), reusable=False)


def forget_prefixes(llm: LLM) -> None:
    llm.loop.call(lambda engine: engine.memory.tree.clear()).result()


def timed(
    llm: LLM, parts: list[TokenPart], fidelity: Fidelity, planner: str
) -> tuple[Document, float]:
    forget_prefixes(llm)
    start = time.perf_counter()
    joined = join_tokens(llm, parts, fidelity=fidelity, planner=planner)
    joined.generate("", SamplingParams(temperature=0, max_tokens=1))
    return joined, time.perf_counter() - start


def logits_of(llm: LLM, document: Document, behind: str) -> torch.Tensor:
    """What a document's own KV says: an exact beginning that is known would answer in its place."""
    forget_prefixes(llm)
    return document.score(behind, return_logits=True)[1]


def divergence(truth: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of rows of logits, in nats."""
    p, q = truth.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


JOINS: dict[str, tuple[Fidelity, str]] = {
    "shifted": ("shifted", "none"),
    "blend": ("repaired", "blend"),
    "craft": ("repaired", "craft"),
    "exact": ("exact", "none"),
}


def test_repaired_passages_are_nearer_and_faster(llm: LLM) -> None:
    chunks, shuffled = passages(llm), random.Random(0)
    head = text_part(llm, SYSTEM, first=True)
    join_tokens(llm, [head, *chunks], fidelity="shifted").close()
    join_tokens(llm, [head, *chunks], planner="craft").close()
    errors: dict[str, list[float]] = {name: [] for name in JOINS if name != "exact"}
    seconds: dict[str, list[float]] = {name: [] for name in JOINS}
    for question in QUESTIONS:
        parts = [head, *shuffled.sample(chunks, len(chunks)), text_part(llm, question)]
        docs = {}
        for name, (fidelity, planner) in JOINS.items():
            docs[name], took = timed(llm, parts, fidelity, planner)
            seconds[name].append(took)
        greedy = SamplingParams(temperature=0, max_tokens=NEXT, ignore_eos=True)
        behind = docs["exact"].generate("", greedy).outputs[0].text
        truth = logits_of(llm, docs["exact"], behind)
        for name, found in errors.items():
            found.append(divergence(truth, logits_of(llm, docs[name], behind)))
        for doc in docs.values():
            doc.close()
    means = {name: sum(found) / len(found) for name, found in errors.items()}
    cold = min(seconds["exact"])
    for name, mean in means.items():
        took = min(seconds[name])
        print(
            f"\n{name}: KL {mean:.4f}, {mean / means['shifted']:.2f} of shifted; "
            f"{took:.2f} s, {took / cold:.2f} of exact"
        )
    assert 0 < means["blend"] < means["shifted"]
    assert 0 < means["craft"] < means["shifted"]
