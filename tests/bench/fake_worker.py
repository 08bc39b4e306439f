"""A worker without an engine, spoken to over the same lines; knows nothing of kvloom.

Its times follow from its speed alone: 1 ms per prompt token and 10 ms per generated token at speed
1. It misbehaves on demand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any


def main() -> None:
    """Serve; the argument is a JSON object with `speed`, `ways`, `fault`, `at` and the like."""
    settings = json.loads(sys.argv[1])
    if settings.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if log := settings.get("log"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"worker": settings["name"], **request}) + "\n")
        if wrong(request, settings):
            continue
        send({"answer": answer(request, settings), "peak_rss_bytes": 1000})
    if settings.get("stubborn"):
        time.sleep(600)


def wrong(request: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Misbehave if this is the request for it; tell whether the request is dealt with."""
    width = max(map(len, request.get("prompts", [[]])))
    settings["store"] = request.get("store", settings.get("store"))
    spared = settings.get("only_with_store") and settings["store"] is None
    elsewhere = request["do"] != settings.get("at", "complete")
    if spared or elsewhere or width < settings.get("from_width", 0):
        return False
    match settings.get("fault"):
        case "raise":
            send({"error": "ValueError: no such thing", "peak_rss_bytes": 1000})
        case "die":
            print("Traceback\nMemoryError: all gone", file=sys.stderr, flush=True)
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "garbage":
            sys.stdout.write("Hello, I am a library\n")
            sys.stdout.flush()
        case "list":
            send([1, 2])
        case "other":
            send({"answer": {"token_ids": "none"}})
        case "empty":
            send({})
        case "short":
            send({"answer": {"token_ids": [[]], "first_token_s": 0.1, "total_s": 0.2}})
        case "negative" | "backwards" | "instant":
            times = {"negative": (-1.0, 1.0), "backwards": (2.0, 1.0), "instant": (1.0, 1.0)}
            first, last = times[settings["fault"]]
            tokens = answer(request, settings)["token_ids"]
            send({"answer": {"token_ids": tokens, "first_token_s": first, "total_s": last}})
        case _:
            return False
    return True


def answer(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what an honest worker would."""
    match request["do"]:
        case "load":
            send({"progress": ["Loading", 1, 2]})
            send({"progress": ["Loading", 2, 2]})
            return {
                "model_path": "folder",
                "dtype": settings.get("dtype", request["dtype"]),
                "threads": request["threads"] or 2,
                "versions": {settings["name"]: "1.0"},
                "ways": settings.get("ways", ["exact", "repaired", "shifted", "restarted"]),
            }
        case "tokenize":
            return {"leading": [7], "tokens": [ord(letter) for letter in request["text"]]}
        case "remember":
            return {}
        case _:
            return completion(request, settings)


def completion(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return tokens that follow from the prompts, shifted from the third on if asked for."""
    speed = settings.get("speed", 1.0)
    kept = request["shared_tokens"]
    if request["way"] in ("repaired", "shifted"):
        kept = len(request["prompts"][0]) - {"repaired": 15, "shifted": 5}[request["way"]]
    computed = sum(max(len(prompt) - kept, 1) for prompt in request["prompts"])
    first_token_s = 0.001 * computed / speed
    wrong_by = request["way"] in settings.get("wrong_ways", [])
    token_ids = [
        [
            (sum(prompt) + place + wrong_by + (settings.get("shift", 0) if place >= 2 else 0))
            % 1000
            for place in range(request["new_tokens"])
        ]
        for prompt in request["prompts"]
    ]
    return {
        "token_ids": token_ids,
        "first_token_s": first_token_s,
        "total_s": first_token_s + 0.01 * request["new_tokens"] / speed,
        "cached_tokens": kept,
    }


def send(message: Any) -> None:
    """Write one line."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
