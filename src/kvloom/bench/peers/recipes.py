"""What each peer is made of, as plain data: packages, sizes, its converter and its format.

Knows: the versions that were found to work, and what installing them took.
Does not know: how an environment is made, or how an engine is driven.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelSource = Literal["folder", "gguf"]

TORCH = "torch=={torch}"
"""A requirement that becomes the running kvloom's own version of torch, build included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One peer.

    Attributes:
        name: what the user calls it.
        module: its worker.
        package: the package that is the engine.
        version: of that package.
        steps: what pip is asked to install, one call after the other.
        download_mb: megabytes that pip downloads, roughly.
        installed_mb: megabytes on disk, roughly.
        install_s: seconds that installing took on two cores.
        format: what it computes in, and stores weights in, whatever the others do.
        source: what it reads: the folder that kvloom loaded, or the GGUF file in it.
        convert: the command of its converter; `{bin}`, `{python}`, `{model}` and `{output}` are
            filled in. Empty if the source is loaded as it is.
        licence: of the package.
        note: what else a user should know.
    """

    name: str
    module: str
    package: str
    version: str
    steps: tuple[tuple[str, ...], ...]
    download_mb: int
    installed_mb: int
    install_s: int
    format: str
    source: ModelSource = "folder"
    convert: tuple[str, ...] = ()
    licence: str
    note: str = ""


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="ctranslate2",
            module="kvloom.bench.peers.ctranslate2_worker",
            package="ctranslate2",
            version="4.8.5",
            steps=((TORCH,), ("ctranslate2==4.8.5", "transformers==5.24.0")),
            download_mb=260,
            installed_mb=1300,
            install_s=90,
            format="int8",
            convert=(
                "{bin}/ct2-transformers-converter",
                *("--model", "{model}", "--output_dir", "{output}", "--quantization", "int8"),
            ),
            licence="MIT",
        ),
    )
}
