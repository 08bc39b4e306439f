"""Requests, documents, cancels and steps in any order, for hypothesis to choose from.

Knows: what a user may do with an engine at any moment.
Does not know: what must come of it; the world checks that.
"""

from __future__ import annotations

from typing import Any

from hypothesis import Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvloom.kv.edit import Truncate
from kvloom.params import SamplingParams
from tests.engine.worlds import Held, World, params, prompts


class AnyMix(RuleBasedStateMachine):
    """Requests, documents, cancels and steps in any order, on pools that are too small."""

    world: World

    @initialize(
        blocks=st.integers(4, 20),
        step_tokens=st.integers(1, 64),
        max_running=st.integers(1, 8),
        caching=st.booleans(),
    )
    def start(self, blocks: int, step_tokens: int, max_running: int, caching: bool) -> None:
        self.world = World(
            blocks=blocks,
            step_tokens=step_tokens,
            max_running=max_running,
            enable_prefix_caching=caching,
        )

    @rule(prompt=prompts(), wanted=params)
    def submit(self, prompt: list[int], wanted: SamplingParams) -> None:
        self.world.submit(prompt, wanted)

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.world.engine.has_work:
                self.world.step()

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(self.world.open)))

    @rule(prompt=prompts())
    def read_document(self, prompt: list[int]) -> None:
        if len(self.world.docs) < 4:
            kv = self.world.compute(prompt)
            assert kv is not None
            self.world.engine.hold(kv)
            self.world.docs.append(Held([*prompt], kv))

    @precondition(lambda self: self.world.docs)
    @rule(data=st.data(), tokens=prompts(longest=40))
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        if len(held.tokens) + len(tokens) <= self.world.limit:
            kv = self.world.compute([*held.tokens, *tokens], held)
            assert kv is not None
            self.world.engine.hold(kv)
            self.world.engine.abandon(held.kv)
            held.tokens, held.kv = [*held.tokens, *tokens], kv

    @precondition(lambda self: self.world.docs)
    @rule(data=st.data(), length=st.integers(1, 200))
    def truncate(self, data: st.DataObject, length: int) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        plan = held.kv.apply(Truncate(min(length, held.kv.length)))
        held.kv.truncate(plan.kept_prefix)
        del held.tokens[length:]
        self.world.engine.memory.check()

    @precondition(lambda self: 0 < len(self.world.docs) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        kv = held.kv.fork()
        self.world.engine.hold(kv)
        self.world.docs.append(Held([*held.tokens], kv))

    @precondition(lambda self: self.world.docs)
    @rule(data=st.data(), question=prompts(longest=20), wanted=params)
    def generate(self, data: st.DataObject, question: list[int], wanted: SamplingParams) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        if len(held.tokens) + len(question) < self.world.limit:
            self.world.submit([*held.tokens, *question], wanted, held=held)

    @precondition(lambda self: self.world.docs)
    @rule(data=st.data(), text=prompts(longest=80))
    def score(self, data: st.DataObject, text: list[int]) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        tokens = [*held.tokens, *text]
        if len(tokens) <= self.world.limit:
            asked = self.world.submit(tokens, None, held=held, score_from=len(held.tokens) - 1)
            while not asked.done:
                self.world.step()
            assert asked.computed is not None
            self.world.engine.release(asked.computed.doc)

    @precondition(lambda self: self.world.docs)
    @rule(data=st.data())
    def close_document(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.world.docs))
        self.world.docs.remove(held)
        self.world.engine.release(held.kv)
        self.world.engine.memory.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        stats = self.world.engine.stats()
        event("preempted" if stats.preemptions else "not preempted")
        event("reused" if stats.prefix_hits else "nothing reused")
        self.world.close()


def run_machine(machine: type[RuleBasedStateMachine], **chosen: Any) -> None:
    # Found at once and shrunk for minutes: the steps as drawn say enough.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, phases=phases, print_blob=True, **chosen)
    )
