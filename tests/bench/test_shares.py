"""A share holds a task against the one that does the same in full, in one report."""

from __future__ import annotations

import pytest

from kvloom.bench.shares import Share, make_shares

from .fakes import TASKS, report, result, sample


def test_times_are_held_against_the_own_and_the_best_peers_whole_work() -> None:
    whole = result("edit-72", kvloom=[sample(1.0)], slow=[sample(4.0)], fast=[sample(2.0)])
    part = result("edit-72-shifted", kvloom=[sample(0.05)], slow=[sample(0.4)], fast=[])
    found = {share.engine: share for share in make_shares(report(whole, part))}
    assert found["kvloom"] == Share(
        task=TASKS["edit-72-shifted"].title,
        name="edit-72-shifted",
        engine="kvloom",
        of_own=pytest.approx(0.05),
        best_peer="fast",
        of_best_peer=pytest.approx(0.025),
    )
    assert found["slow"].of_own == pytest.approx(0.1)
    assert found["slow"].of_best_peer == pytest.approx(0.2)
    assert "fast" not in found, "an engine that cannot do such a thing has no share"


def test_without_peers_or_the_whole_work_there_is_less_to_say() -> None:
    warm = result("shared-warm", kvloom=[sample(0.05)])
    assert make_shares(report(warm)) == []
    (alone,) = make_shares(report(result("shared-cold", kvloom=[sample(1.0)]), warm))
    assert (alone.of_own, alone.best_peer, alone.of_best_peer) == (0.05, None, None)
    failed = report(result("shared-cold", kvloom="no room", peer=[sample()]), warm)
    (share,) = make_shares(failed)
    assert (share.of_own, share.best_peer) == (None, "peer")
