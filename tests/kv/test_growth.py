from __future__ import annotations

from kvloom.kv.growth import Growth
from kvloom.kv.pool import PAGE_SLOTS
from tests.kv.worlds import World, layer_spec


def world_of(*lengths: int) -> World:
    world = World(0, (layer_spec(0),))
    for length in lengths:
        world.new(0, length)
    return world


def follows(growth: Growth, world: World, rows: int = 1, *, in_tile: bool = True) -> bool:
    for doc in world.docs:
        world.append(doc, rows)
    return growth.follows(world.docs, rows * len(world.docs), in_tile=in_tile)


def test_one_row_per_document_follows_inside_a_tile() -> None:
    world, growth = world_of(5, 9), Growth()
    assert not follows(growth, world)
    assert [follows(growth, world) for _ in range(PAGE_SLOTS)].count(False) == 2


def test_tiles_may_be_ignored() -> None:
    world, growth = world_of(5), Growth()
    follows(growth, world)
    assert all(follows(growth, world, in_tile=False) for _ in range(2 * PAGE_SLOTS))


def test_whatever_else_changes_does_not_follow() -> None:
    world, growth = world_of(5, 9), Growth()
    follows(growth, world)
    assert not follows(growth, world, rows=2)
    assert not follows(growth, world), "a plan of two rows"
    assert follows(growth, world)
    world.docs[0].truncate(3)
    assert not follows(growth, world)
    assert follows(growth, world)
    world.docs.reverse()
    assert not follows(growth, world)
    world.docs.append(world.docs[0].fork())
    assert not follows(growth, world)
    # A fork closes the tail, and the next row opens another.
    world.docs[-1].fork().close()
    assert not follows(growth, world)
    assert follows(growth, world)


def test_a_step_without_new_rows_does_not_follow() -> None:
    world, growth = world_of(5), Growth()
    follows(growth, world)
    assert not growth.follows(world.docs, 1, in_tile=False)
