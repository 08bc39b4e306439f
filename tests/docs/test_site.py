"""The site builds without a warning, and its pages load nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.docs.pages import ROOT, name_of

DRAWINGS = sorted((ROOT / "docs").rglob("*.svg"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a page loads by itself; links that a reader may follow are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src" or (name == "href" and tag in {"link", "use", "image"}):
                self.addresses.append(value or "")


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.addresses, f"{page} loads no style sheet"
        remote = [a for a in loads.addresses if re.match(r"(https?:)?//", a)]
        assert not remote, f"{page} loads {remote}"
    sheets = "".join(sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s\"')]+", sheets)


def test_nothing_is_left_to_fill_in(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- generated" not in text, page
        assert "--8<--" not in text, page
        assert "::: kvloom" not in text, page


def test_reference_holds_all_public_names(site: Path) -> None:
    import kvloom

    pages = "".join(p.read_text(encoding="utf-8") for p in (site / "reference").glob("*.html"))
    missing = [
        name
        for name in kvloom.__all__
        if not name.startswith("__") and not re.search(rf'id="kvloom\.([a-z]+\.)*{name}"', pages)
    ]
    assert not missing


def test_there_are_drawings() -> None:
    names = {drawing.stem for drawing in DRAWINGS}
    assert {"rows", "fold", "positions", "arena"} <= names


@pytest.mark.parametrize("drawing", DRAWINGS, ids=name_of)
def test_drawings_can_stand_inside_a_page(drawing: Path) -> None:
    text = drawing.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert root.find("{*}title") is not None, "nobody can read it aloud"
    assert "\n\n" not in text, "an empty line would end the figure in Markdown"
    # Ids are shared by all drawings of a page.
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert all(name.startswith(f"{drawing.stem}-") for name in ids if name)


@pytest.mark.parametrize("drawing", DRAWINGS, ids=name_of)
def test_drawings_take_the_colours_of_the_page(drawing: Path) -> None:
    root = ElementTree.parse(drawing).getroot()
    fixed = re.compile(r"#[0-9a-f]{3,8}|black|white|rgb", re.IGNORECASE)
    for node in root.iter():
        for name in ("fill", "stroke"):
            assert not fixed.search(node.get(name, "")), f"{node.tag} has a colour of its own"
