"""Keeps credentials out of what lasts: finds them in text, and remembers what has attended to them.

Knows: rules for credentials, and lineages that contain one.
Does not know: tiers or tokenizers; the caller brings text.

Rules and entropy limits come from detect-secrets; of that library only the matching of strings is
used, never its checks over the network. Nothing that was found is kept or logged but its kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.filters import heuristic
from detect_secrets.plugins.high_entropy_strings import HighEntropyStringsPlugin

from kvloom.kv.lineage import Lineage
from kvloom.store.key import context_of

# An address is no credential.
_LEFT_OUT = frozenset({"IPPublicDetector"})
# Values without quotes, as in .env files, for which the library's rule takes any word.
_ASSIGNMENT = re.compile(
    r"(?:api_?-?key|auth_?-?token|access_?-?token|client_?-?secret|secret(?:_?-?access)?(?:_?-?key)?"
    r"|passw(?:or)?d|pwd|token)\s*[:=]\s*([^\s'\"()\[\]{}<>$,;]{8,})\s*$",
    re.IGNORECASE,
)
_MAX_LINE = 2000
"""Characters after which a line is cut, with an overlap: some rules are quadratic in its length."""
_OVERLAP = 200
ASSIGNED = "Assigned secret"


class SecretScanner:
    """Says which kinds of credentials a text seems to hold."""

    def __init__(self) -> None:
        classes: dict[str, Any] = get_mapping_from_secret_type_to_class()
        self._rules: list[Any] = [
            rule() for _, rule in sorted(classes.items()) if rule.__name__ not in _LEFT_OUT
        ]

    def scan(self, text: str) -> tuple[str, ...]:
        """Return the kinds that were found, sorted; empty if the text may be kept.

        Errs on the side of finding. A credential that two chunks share is found only in a text
        that holds it whole.
        """
        return tuple(sorted({kind for line in _lines(text) for kind in self._kinds(line)}))

    def _kinds(self, line: str) -> Iterator[str]:
        for rule in self._rules:
            if any(_is_likely(rule, found) for found in rule.analyze_string(line)):
                yield rule.secret_type
        match = _ASSIGNMENT.search(line)
        if match and re.search(r"\d", match[1]) and re.search(r"[A-Za-z]", match[1]):
            yield ASSIGNED


class SecretContexts:
    """The contexts that contain a credential; in memory only."""

    def __init__(self) -> None:
        self._contexts: set[bytes] = set()

    def add(self, origin: Lineage, tokens: Sequence[int] | np.ndarray) -> None:
        """Remember every context that begins with the origin and at least one of the tokens.

        Where in the tokens the credential stands is not known, and a chunk may be used in part.
        """
        lineage = origin
        for token in np.asarray(tokens).tolist():
            lineage = lineage.extend((token,))
            self._contexts.add(context_of(lineage))

    def __contains__(self, context: bytes | None) -> bool:
        return context in self._contexts


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        for start in range(0, max(len(line), 1), _MAX_LINE):
            yield line[max(start - _OVERLAP, 0) : start + _MAX_LINE]


def _is_likely(rule: Any, found: str) -> bool:
    """Leave out what only looks like a credential."""
    if isinstance(rule, HighEntropyStringsPlugin):
        if rule.calculate_shannon_entropy(found) <= rule.entropy_limit:
            return False
        if heuristic.is_potential_uuid(found):
            return False
    return not (
        heuristic.is_sequential_string(found)
        or heuristic.is_templated_secret(found)
        or heuristic.is_not_alphanumeric_string(found)
        or heuristic.is_prefixed_with_dollar_sign(found)
    )
