"""A server around the fake engine in a process of its own, to be killed by signals.

Knows: how to start one and where it says that it listens.
Does not know: what it is asked.
"""

from __future__ import annotations

import sys

from kvloom.serve.app import create_app
from kvloom.serve.config import ServerConfig
from kvloom.serve.server import run

from .fake_llm import FakeAsyncLLM


def main() -> None:
    """Serve; arguments are the delay per token and the grace time, in seconds."""
    llm = FakeAsyncLLM()
    llm.delay_s = float(sys.argv[1])
    config = ServerConfig(port=0, grace_s=float(sys.argv[2]))
    run(create_app(llm, config), config, on_ready=lambda url: print(url, flush=True))
    print(f"closed={llm.closed} live={llm.live} {dict(llm.finished)}", flush=True)


if __name__ == "__main__":
    main()
