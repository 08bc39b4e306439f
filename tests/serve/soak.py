"""Many clients at once on one server, for long: read, leave and cancel at random.

Knows: the lone answer of every prompt, and how to count what came.
Does not know: what the numbers should be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from kvloom import AsyncLLM
from kvloom.ops.native.heap import release_freed_memory
from kvloom.outputs import EngineStats

from .running import RunningServer, events_of, eventually


@dataclass
class Tally:
    """How the requests of a soak ended."""

    equal: int = 0
    near: int = 0
    left: int = 0
    cancelled: int = 0


class Soak:
    """64 clients that read, leave or cancel at random; every prompt has a lone answer to match."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.tally = Tally()
        # Prompts of different lengths, so that usage.prompt_tokens tells them apart too.
        self.bodies = [
            {
                "prompt": f"Item {number}:" + " and more" * number + f". Item {number + 1}:",
                "max_tokens": 12,
                "temperature": 0,
                "ignore_eos": True,
            }
            for number in range(40)
        ]
        self.lone = [server.post("/v1/completions", body).json() for body in self.bodies]

    async def run(self, count: int) -> None:
        pending = iter(range(count))
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=600, limits=limits, verify=False
        ) as client:
            await asyncio.gather(*(self._work(client, pending) for _ in range(64)))

    async def _work(self, client: httpx.AsyncClient, pending: Iterator[int]) -> None:
        for _ in pending:
            number = self.rng.randrange(len(self.bodies))
            plan = self.rng.choices(["read", "whole", "leave", "cancel"], [4, 2, 3, 1])[0]
            if plan == "whole":
                reply = (await client.post("/v1/completions", json=self.bodies[number])).json()
                self._check(number, reply["choices"][0]["text"], reply["usage"])
            elif plan == "cancel":
                await self._cancel(client, number)
            else:
                await self._stream(client, number, leave=plan == "leave")

    async def _cancel(self, client: httpx.AsyncClient, number: int) -> None:
        try:
            async with asyncio.timeout(self.rng.random()):
                body = self.bodies[number] | {"max_tokens": 400}
                await client.post("/v1/completions", json=body)
        except TimeoutError:
            self.tally.cancelled += 1

    async def _stream(self, client: httpx.AsyncClient, number: int, *, leave: bool) -> None:
        body = self.bodies[number] | {"stream": True, "stream_options": {"include_usage": True}}
        events_left = self.rng.randrange(1, 8) if leave else -1
        text, usage, done = "", None, False
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line:
                    continue
                (event,) = events_of(f"{line}\n\n")
                if event == "[DONE]":
                    done = True
                    break
                assert "error" not in event
                usage = event["usage"]
                text += "".join(choice["text"] for choice in event["choices"])
                events_left -= 1
                if not events_left:
                    self.tally.left += 1
                    return
        assert done
        self._check(number, text, usage)

    def _check(self, number: int, text: str, usage: dict[str, Any] | None) -> None:
        lone = self.lone[number]
        assert usage is not None
        assert usage["prompt_tokens"] == lone["usage"]["prompt_tokens"]
        assert usage["completion_tokens"] == 12
        if text == lone["choices"][0]["text"]:
            self.tally.equal += 1
        else:
            # Two logits may lie so close that the batch's rounding decides between them.
            others = {reply["choices"][0]["text"] for reply in self.lone}
            assert text not in others
            self.tally.near += 1


@dataclass
class Soaked:
    """What a soak came to.

    Fields:
        tally: how the requests ended.
        prompts: different prompts, each of which was asked once alone as well.
        sizes: resident bytes of the process after each quarter.
        stats: of the engine at the end.
        health: what the server says of itself at the end.
    """

    tally: Tally
    prompts: int
    stats: EngineStats
    health: dict[str, Any]
    sizes: list[int] = field(default_factory=list)


def soak(caching: bool, count: int) -> Soaked:
    """Run a soak of `count` requests; call it in a process of its own, whose size it measures."""
    llm = AsyncLLM("default", dtype="float32", kv_memory="192MiB", enable_prefix_caching=caching)
    with RunningServer(llm, served_model_name="smol") as server:
        clients = Soak(server, seed=count)
        sizes = []
        for _ in range(4):
            asyncio.run(clients.run(count // 4))
            eventually(lambda: is_idle(asyncio.run(llm.stats())), timeout_s=60)
            release_freed_memory()  # the engine does so itself once it has rested for a second
            sizes.append(psutil.Process().memory_info().rss)
        stats, health = asyncio.run(llm.stats()), server.get("/health").json()
        return Soaked(clients.tally, len(clients.bodies), stats, health, sizes)


def is_idle(stats: EngineStats) -> bool:
    return stats.running == 0 and stats.waiting == 0
