"""Measures what serving adds: 16 clients that stream, beside the same prompts without a server.

Knows: the Python interface and HTTP.
Does not know: how either works.

Run it on an idle machine: python tools/streaming_cost.py [rounds]
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import sys
import threading
import time

from kvloom import LLM, SamplingParams
from kvloom.engine.aio import AsyncLLM
from kvloom.serve.app import create_app
from kvloom.serve.config import ServerConfig
from kvloom.serve.server import DrainingServer, listen

MODEL = "default"
CLIENTS = 16
PROMPT_TOKENS = 256
OUTPUT_TOKENS = 128


def prompts(number: int) -> list[list[int]]:
    """Return prompts that no other round has."""
    return [
        [(17 * i + 101 * client + 1009 * number) % 40000 + 100 for i in range(PROMPT_TOKENS)]
        for client in range(CLIENTS)
    ]


def offline(llm: LLM, asked: list[list[int]]) -> float:
    """Return the seconds of one batch."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(asked, params)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == OUTPUT_TOKENS for output in outputs)
    return seconds


def served(port: int, asked: list[list[int]]) -> float:
    """Return the seconds until the last of as many streams has ended."""
    start = time.perf_counter()
    waiting = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for tokens in asked:
        body = json.dumps(
            {"model": MODEL, "prompt": tokens, "max_tokens": OUTPUT_TOKENS, "stream": True}
            | {"temperature": 0, "ignore_eos": True}
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        waiting.register(client, selectors.EVENT_READ)
        tails[client] = b""
    while tails:
        for key, _ in waiting.select():
            client = key.fileobj
            assert isinstance(client, socket.socket)
            got = client.recv(1 << 16)
            tails[client] = (tails[client] + got)[-200:]
            assert got, tails[client]
            if b"[DONE]" in tails[client]:
                waiting.unregister(client)
                client.close()
                del tails[client]
    return time.perf_counter() - start


def main() -> None:
    """Print the medians and what serving adds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    llm, served_llm = LLM(), AsyncLLM()
    urls: list[str] = []
    config = ServerConfig(port=0, served_model_name=MODEL)
    server = DrainingServer(create_app(served_llm, config), config, on_ready=urls.append)
    sockets = [listen(config)]
    threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True).start()
    while not urls:
        time.sleep(0.1)
    port = int(urls[0].rpartition(":")[2])
    plain, streamed = [], []
    for number in range(rounds + 1):  # the first one warms up
        plain.append(offline(llm, prompts(number)))
        streamed.append(served(port, prompts(number)))
    server.should_exit = True
    alone, together = statistics.median(plain[1:]), statistics.median(streamed[1:])
    print(
        f"{CLIENTS} prompts: {alone:.2f} s without a server, {together:.2f} s streamed "
        f"({together / alone - 1:+.1%}; rounds {plain[1:]} and {streamed[1:]})"
    )


if __name__ == "__main__":
    main()
