"""Turns the progress bars and warnings of transformers into calls of our own progress function.

Knows: where transformers makes its bars.
Does not know: what is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any

from kvloom.model.digest import Progress

# The reader of GGUF files makes its bar without the hook that transformers offers.
_UNHOOKED_BARS = ("transformers.modeling_gguf_pytorch_utils",)


@contextmanager
def quiet_transformers(progress: Progress | None, description: str) -> Iterator[None]:
    """Silence transformers below errors and report its bars as `description`; undone at the end.

    What is silenced belongs to the process: loads in several threads at once may let a bar through.
    """
    from transformers.utils import logging as untyped_logging

    logging: Any = untyped_logging

    def make_bar(*args: Any, **kwargs: Any) -> _Bar:
        return _Bar(progress, description, *args, **kwargs)

    def hook(_factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return make_bar(*args, **kwargs)

    if progress is not None:
        progress(description, 0, 0)
    verbosity = logging.get_verbosity()
    previous_hook = logging.set_tqdm_hook(hook)
    logging.set_verbosity_error()
    replaced = []
    for name in _UNHOOKED_BARS:
        module = importlib.import_module(name)
        if hasattr(module, "tqdm"):
            replaced.append((module, module.tqdm))
            module.tqdm = make_bar  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in replaced:
            module.tqdm = original  # type: ignore[attr-defined]
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(previous_hook)


class _Bar:
    """As much of a tqdm bar as transformers uses."""

    def __init__(
        self,
        progress: Progress | None,
        description: str,
        iterable: Iterable[Any] | None = None,
        *_args: Any,
        total: float | None = None,
        **_kwargs: Any,
    ) -> None:
        self._iterable: Iterable[Any] = iterable if iterable is not None else ()
        self._progress = progress
        self._description = description
        self.total = int(total if total is not None else length_hint(self._iterable))
        self.n = 0

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        if self._progress is not None:
            self._progress(self._description, self.n, self.total)

    def __iter__(self) -> Iterator[Any]:
        for element in self._iterable:
            yield element
            self.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None
