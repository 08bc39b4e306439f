"""Work ends when nobody waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvloom.serve.errors import ClientGoneError, ShuttingDownError
from kvloom.serve.guard import Guard


class Client:
    """A client that may leave."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Work that runs until it is cancelled, and cleans up slowly."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cleaned = False

    async def run(self) -> None:
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.cleaned = True


def tasks_left() -> int:
    return len(asyncio.all_tasks()) - 1


def test_returns_what_the_work_returns() -> None:
    async def scenario() -> None:
        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        assert await Guard().run(work(), Client().receive) == "done"
        assert tasks_left() == 0

    asyncio.run(scenario())


def test_raises_what_the_work_raises() -> None:
    async def scenario() -> None:
        async def work() -> None:
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await Guard().run(work(), Client().receive)
        assert tasks_left() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("why", ["client", "shutdown", "cancel"])
def test_cancels_and_waits_for_the_clean_up(why: str) -> None:
    async def scenario() -> None:
        guard, client, work = Guard(), Client(), Work()
        running = asyncio.create_task(guard.run(work.run(), client.receive))
        await work.started.wait()
        expected: type[BaseException]
        if why == "client":
            expected = ClientGoneError
            client.left.set()
        elif why == "shutdown":
            expected = ShuttingDownError
            guard.closing.set()
        else:
            expected = asyncio.CancelledError
            running.cancel()
        with pytest.raises(expected):
            await running
        assert work.cleaned
        assert tasks_left() == 0

    asyncio.run(scenario())


def test_finished_work_wins_over_a_client_that_left() -> None:
    async def scenario() -> None:
        async def work() -> int:
            return 7

        client = Client()
        client.left.set()
        assert await Guard().run(work(), client.receive) == 7

    asyncio.run(scenario())
