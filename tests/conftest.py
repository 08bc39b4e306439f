"""Fixtures, hypothesis profiles and shape checks that several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes of the pure tensor functions are checked at run time, in tests only.
install_import_hook("kvloom.ops", "beartype.beartype")

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=300, deadline=None, print_blob=True)
settings.load_profile("dev")


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nothing-missing",
        action="store_true",
        help="fail if data or a service that a marked test needs is missing",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count, tests whose data is missing; where nothing may be, they fail."""
    if SHARED_DATA.is_dir() or config.getoption("--nothing-missing"):
        return
    missing = [item for item in items if item.get_closest_marker("shared_data")]
    items[:] = [item for item in items if item not in missing]
    config.hook.pytest_deselected(items=missing)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    return SHARED_DATA


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The folder of the embedded model, converted into the user's cache if it is not there."""
    from kvloom.model.convert import convert_gguf
    from kvloom.model.source import resolve_source

    return convert_gguf(resolve_source("default"))
