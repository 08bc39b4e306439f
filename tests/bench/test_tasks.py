"""The table of tasks says what the issue asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvloom import RequestError
from kvloom.bench.tasks import FULL, QUICK, Sizes, choose_tasks, make_tasks, work_units

FULL_TASKS = make_tasks(FULL)


def test_the_full_table_has_the_sizes_that_speed_is_judged_by() -> None:
    by_family: dict[str, list[int]] = {}
    for task in FULL_TASKS:
        by_family.setdefault(task.family, []).extend(task.prompt_tokens)
    assert by_family["prefill"] == [512, 2048, 6000]
    assert by_family["decode"] == [512, 4096]
    assert len(by_family["batch"]) == 16
    assert min(by_family["batch"]) == 50
    assert max(by_family["batch"]) == 300
    assert len(set(by_family["batch"])) == 16


def test_the_warm_task_differs_from_the_cold_one_in_what_is_shared_only() -> None:
    cold, warm = (task for task in FULL_TASKS if task.family == "shared")
    assert (cold.shared_tokens, warm.shared_tokens) == (0, 3000)
    assert cold.prompt_tokens == warm.prompt_tokens
    assert warm.prompt_tokens[0] > warm.shared_tokens


def test_the_edit_changes_one_line_of_a_long_text() -> None:
    edit, *approximate = (task for task in FULL_TASKS if task.family == "edit")
    assert (edit.name, edit.prompt_tokens, edit.new_tokens) == ("edit-4000", (4000,), 1)
    assert 0 < edit.replaced_tokens < edit.edited_tokens < 20
    assert [task.way for task in (edit, *approximate)] == ["exact", "repaired", "shifted"]
    for task in approximate:
        assert task.approximate
        assert task.new_tokens > 1
        same = {"way": task.way, "name": task.name, "title": task.title}
        same |= {"new_tokens": task.new_tokens, "held_against": edit.name}
        assert replace(edit, **same) == task


def test_after_a_restart_all_of_the_cold_prompt_but_its_last_token_is_known() -> None:
    cold, warm = (task for task in FULL_TASKS if task.family == "restart")
    assert cold.prompt_tokens == warm.prompt_tokens == (warm.shared_tokens + 1,) == (4000,)
    assert (cold.way, warm.way, warm.held_against) == ("exact", "restarted", cold.name)
    # The text is computed before the restart, which takes as long as a cold one.
    assert work_units(warm) == work_units(cold)


@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_what_a_task_is_held_against_is_an_exact_task(sizes: Sizes) -> None:
    tasks = {task.name: task for task in make_tasks(sizes)}
    held = [task for task in tasks.values() if task.held_against]
    assert {task.family for task in held} == {"shared", "edit", "restart"}
    for task in held:
        assert tasks[task.held_against].way == "exact"
        assert not tasks[task.held_against].held_against


@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_names_and_titles_are_unique_and_work_is_positive(sizes: object) -> None:
    tasks = make_tasks(sizes)
    assert len({task.name for task in tasks}) == len({task.title for task in tasks}) == len(tasks)
    assert all(work_units(task) > 0 for task in tasks)


def test_quick_tasks_have_the_same_families() -> None:
    families = {task.family for task in FULL_TASKS}
    assert {task.family for task in make_tasks(QUICK)} == families


def test_tasks_are_chosen_by_name_and_family_in_the_order_of_the_table() -> None:
    chosen = choose_tasks(FULL_TASKS, ["shared-warm", "prefill"])
    assert [task.name for task in chosen] == [
        "prefill-512",
        "prefill-2048",
        "prefill-6000",
        "shared-warm",
    ]
    assert choose_tasks(FULL_TASKS, []) == FULL_TASKS


@pytest.mark.parametrize("name", ["", "prefil", "prefill-", "512"])
def test_an_unknown_task_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RequestError, match=r"known are: .*prefill-512") as caught:
        choose_tasks(FULL_TASKS, [name])
    assert caught.value.param == "tasks"
