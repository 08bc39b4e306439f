"""Requests, documents, cancels and steps in any order, for hypothesis to choose from.

Knows: what a user may do with an engine at any moment.
Does not know: what must come of it; the world checks that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from kvloom import Document
from kvloom.engine.joining import Joining, TokenPart
from kvloom.engine.request import Repaired
from kvloom.errors import CapacityError, RequestError
from kvloom.kv.edit import Truncate
from kvloom.params import SamplingParams
from kvloom.reuse.planner import PLANNERS, planner
from kvloom.reuse.select import selector
from kvloom.store.key import ANYBODY, hash_tenant
from tests.engine.worlds import BOOKS, Held, World, check_states, params, prompts

wishes = st.fixed_dictionaries(
    {
        "fidelity": st.sampled_from(["exact", "repaired", "shifted"]),
        "share": st.sampled_from([0, 0.2, 1]),
        "selector": st.sampled_from(["blend", "first", "random"]),
    }
)
chunked = st.lists(
    st.builds(TokenPart, prompts(longest=70).map(tuple), st.booleans()), min_size=1, max_size=4
)

tenants = st.sampled_from([ANYBODY, hash_tenant("somebody")])


class AnyMix(RuleBasedStateMachine):
    """Requests, documents, cancels and steps in any order, on pools that are too small."""

    world: World
    texts: list[Document]

    @initialize(
        blocks=st.integers(4, 20),
        step_tokens=st.integers(1, 64),
        max_running=st.integers(1, 8),
        caching=st.booleans(),
    )
    def start(self, blocks: int, step_tokens: int, max_running: int, caching: bool) -> None:
        self.texts = []
        self.world = World(
            blocks=blocks,
            step_tokens=step_tokens,
            max_running=max_running,
            enable_prefix_caching=caching,
            repair_when_idle=True,
        )
        self.read_text(BOOKS[0][:120])

    @rule(prompt=prompts(), wanted=params, tenant=tenants)
    def submit(self, prompt: list[int], wanted: SamplingParams, tenant: str) -> None:
        self.world.submit(prompt, wanted, tenant=tenant)

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.world.engine.has_work:
                self.world.step()

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(self.world.open)))

    @rule(prompt=prompts(), tenant=tenants)
    def read_document(self, prompt: list[int], tenant: str) -> None:
        if len(self.world.docs) < 4:
            kv = self.world.compute(prompt, tenant=tenant)
            assert kv is not None
            self.world.engine.hold(kv)
            self.world.docs.append(Held([*prompt], kv, tenant))

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
        self.world.docs.append(Held([*held.tokens], kv, held.tenant))

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

    @precondition(lambda self: len(self.texts) < 3)
    @rule(prompt=prompts(longest=150), tenant=tenants)
    def read_text(self, prompt: list[int], tenant: str = ANYBODY) -> None:
        doc = Document(self.host, tenant=tenant)
        with self.unless_full(doc):
            doc.append_tokens(prompt)
        self.texts.append(doc)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), new=st.text("ab ,", max_size=70), asked=wishes)
    def edit(self, data: st.DataObject, new: str, asked: dict[str, Any]) -> None:
        doc = data.draw(st.sampled_from(self.texts))
        text = doc.text
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        with self.unless_full(doc):
            receipt = doc.edit(start, stop, new, **asked)
            assert doc.text == text[:start] + new + text[stop:]
            check_states(receipt.tokens, len(doc.tokens))
            event(f"edited: {receipt.fidelity}")

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def make_exact(self, data: st.DataObject) -> None:
        doc = data.draw(st.sampled_from(self.texts))
        with self.unless_full(doc):
            doc.repair()
            assert set(doc.provenance.tokens) <= {"exact"}

    @rule(count=st.integers(1, 6))
    def idle(self, count: int) -> None:
        texts = [doc.tokens for doc in self.texts]
        done = self.world.idle(count)
        event("made more exact" if done else "nothing to make exact")
        assert [doc.tokens for doc in self.texts] == texts
        for doc in self.texts:
            self.world.check_exact_part(doc.kv)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), share=st.floats(0, 1), steps=st.integers(0, 5))
    def repair_and_cancel(self, data: st.DataObject, share: float, steps: int) -> None:
        kv, engine = data.draw(st.sampled_from(self.texts)).kv, self.world.engine
        events: list[Any] = []
        name = engine.repair(kv, share, selector("blend"))
        self.world.mailboxes[name] = events.append
        for _ in range(steps):
            self.world.step()
        if not events:
            del self.world.mailboxes[name]
            assert engine.cancel(name) == []
        elif isinstance(events[0], Repaired):
            assert events[0].doc.tokens in ([], kv.tokens) or not kv.tokens
            engine.release(events[0].doc)
        engine.memory.check()

    @precondition(lambda self: len(self.texts) < 3)
    @rule(parts=chunked, asked=wishes, name=st.sampled_from(list(PLANNERS)), tenant=tenants)
    def join(self, parts: list[TokenPart], asked: dict[str, Any], name: str, tenant: str) -> None:
        tokens = [token for part in parts for token in part.tokens]
        loop: Any = self.world.loop
        wanted = (asked["fidelity"], planner(name, asked["share"]), tenant)
        joining = Joining(loop, self.world.spec, (0, 30), *wanted)
        with self.unless_full():
            joined = joining.join(parts)
            found = (joined.tokens, joined.doc, joined.receipt)
            self.texts.append(Document(self.host, *found, tenant=tenant))
            assert joined.tokens == tokens

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), wanted=params, tenant=tenants)
    def ask_for_the_same_tokens(
        self, data: st.DataObject, wanted: SamplingParams, tenant: str
    ) -> None:
        doc = data.draw(st.sampled_from(self.texts))
        if 0 < len(doc.tokens) < self.world.limit:
            self.world.submit(doc.tokens, wanted, tenant=tenant)

    @precondition(lambda self: len(self.texts) > 1)
    @rule(data=st.data())
    def close_text(self, data: st.DataObject) -> None:
        doc = data.draw(st.sampled_from(self.texts))
        self.texts.remove(doc)
        doc.close()

    @property
    def host(self) -> Any:
        return self.world

    @contextmanager
    def unless_full(self, doc: Document | None = None) -> Iterator[None]:
        """What does not fit is said, and changes nothing."""
        tokens = None if doc is None else doc.tokens
        try:
            yield
        except (CapacityError, RequestError):
            event("did not fit")
            assert doc is None or doc.tokens == tokens
        self.world.engine.release_abandoned()
        self.world.engine.memory.check()
        assert not self.world.engine.memory.in_work

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        assert self.world.idle(10_000) < 10_000, "the repairs do not come to an end"
        for doc in self.texts:
            all_exact = set(doc.provenance.tokens) <= {"exact", "forgotten"}
            assert all_exact or self.world.engine.pool.free_blocks == 0
            self.world.check_exact_part(doc.kv)
            doc.close()
        self.world.engine.release_abandoned()
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
