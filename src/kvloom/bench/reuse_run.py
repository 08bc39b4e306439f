"""The bench of joined chunks: what is measured of each prompt.

Knows: how a prompt becomes a result, and which prompts are too long.
Does not know: how chunks are joined, or in which order prompts are measured.
"""

from __future__ import annotations

from kvloom.bench.case_run import Running, begin, run_cases
from kvloom.bench.reuse_cases import ChunkRule, Material, ReuseCase
from kvloom.bench.reuse_engine import Engines
from kvloom.bench.reuse_kinds import make_kinds, measure
from kvloom.bench.reuse_results import ReuseOptions, ReuseReport, ReuseResult

GROUP = "prompts"


def run_reuse(
    engines: Engines, options: ReuseOptions, material: Material, running: Running[ReuseReport]
) -> ReuseReport:
    """Measure prompts until there are enough of them.

    Args:
        engines: without prefix caching, else equal texts would answer for approximate ones, and
            without repairs, else these would become exact.
        options: what is measured.
        material: what prompts are made of.
        running: how.

    Raises:
        RequestError: the earlier report is about something else, or there is no prompt to measure.
    """
    kinds, llm = make_kinds(options.shares), engines.llm  # whose tokenizer outlives it
    fresh = begin(ReuseReport, llm, material.title, options, [kind.name for kind in kinds])

    def length(text: str) -> int:
        return len(llm.tokenizer.encode(text, add_special_tokens=False))

    def measured(case: ReuseCase) -> ReuseResult | str:
        tokens = len(llm.tokenizer.encode(case.lead))
        tokens += sum(length(text) for text in (*case.chunks, case.question))
        if tokens + options.scored > llm.spec.max_positions:
            return f"the prompt is longer than the context of {llm.spec.max_positions} tokens"
        scored, outcomes = measure(engines, case, kinds, options.seed, options.scored)
        return ReuseResult(
            name=case.name,
            group=GROUP,
            tokens=tokens,
            scored=scored.tokens,
            outcomes=outcomes,
            chunks=len(case.chunks),
            answered=scored.answered,
        )

    rule = ChunkRule(options.chunks, options.chunk_tokens, length)
    return run_cases(fresh, material.cases(rule), measured, running)
