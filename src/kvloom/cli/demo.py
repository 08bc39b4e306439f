"""`kvloom demo`: two questions about a real file; the second one finds its tokens computed.

Knows: the file, the questions, and how the two answers compare.
Does not know: how an answer is streamed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvloom.cli.answer import cost_table
from kvloom.cli.ask import answer_all
from kvloom.cli.progress import long_work
from kvloom.cli.settings import EngineOptions, ModelOption
from kvloom.cli.terminal import Terminal
from kvloom.errors import RequestError

if TYPE_CHECKING:
    from kvloom.outputs import Usage

MODULE = "timeit"
"""About 3,400 tokens, and a small model understands it well enough to answer rightly."""
QUESTIONS = (
    "What does this module measure? Answer in one sentence.",
    "Which class does this module define, and what does it do? Answer in one sentence.",
)
MAX_TOKENS = 120


def demo(*, model: ModelOption = "default", options: EngineOptions) -> None:
    """Answer two questions about a module of Python's standard library."""
    from kvloom.params import SamplingParams

    terminal = Terminal()
    text = module_source(MODULE)
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom.engine.llm import LLM

        llm = LLM(model, **options.settings(progress))
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    with llm:
        num_tokens = len(llm.tokenizer.encode(text))
        terminal.say(
            f"{llm.model_path.name} reads {MODULE}.py of Python's standard library "
            f"({len(text):,} characters, {num_tokens:,} tokens) and answers two questions.\n"
        )
        usages = answer_all(llm, f"{MODULE}.py", text, QUESTIONS, params, terminal)
    terminal.messages.print()
    terminal.messages.print(cost_table(QUESTIONS, usages))
    terminal.say(f"\n{comparison(*usages)}")


def module_source(name: str) -> str:
    """Return the source of a module of the standard library, without importing it.

    Raises:
        RequestError: this Python comes without the source.
    """
    spec = find_spec(name)
    source = getattr(spec.loader, "get_source", lambda _: None)(name) if spec else None
    if not source:
        raise RequestError(
            f"This Python comes without the source of {name}; try `kvloom ask FILE QUESTION`."
        )
    return str(source)


def comparison(first: Usage, second: Usage) -> str:
    """Return a sentence on what the second answer did not have to compute."""
    text = (
        f"The second question reused {second.cached_tokens:,} of its {second.prompt_tokens:,} "
        "prompt tokens"
    )
    cold, warm = first.time_to_first_token_s, second.time_to_first_token_s
    if not cold or not warm:
        return f"{text}."
    return f"{text}: its first token came after {warm:.2f} s instead of {cold:.2f} s."
