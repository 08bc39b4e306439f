"""Fetches a model from the Hugging Face hub into the hub's own cache.

Knows: which files of a repository are wanted, and what the hub's errors mean to a user.
Does not know: what the files hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvloom.errors import ModelLoadError
from kvloom.model.digest import Progress
from kvloom.model.source import ModelSource, check_has_weights

_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt")
# Folders hold other formats, and "consolidated" the same weights once more.
_UNWANTED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")


def download(
    source: ModelSource, *, with_code: bool = False, progress: Progress | None = None
) -> Path:
    """Return the local folder of a hub model; files that are there are not fetched again.

    Args:
        source: a source of kind `hub`.
        with_code: fetch Python files too.
        progress: is told about the files.

    Raises:
        ModelLoadError: the hub cannot be reached, does not know the model, or keeps it closed.
    """
    from huggingface_hub import errors, snapshot_download

    wanted = [*_WANTED, "*.py"] if with_code else list(_WANTED)
    try:
        folder = Path(
            snapshot_download(
                source.name,
                allow_patterns=wanted,
                ignore_patterns=list(_UNWANTED),
                tqdm_class=_bar_class(progress, f"Downloading {source.name}"),
            )
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{source.name} is gated; accept its terms on its hub page and log in with "
            "`hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{source.name} is neither a path here nor a public model of the hub; check the name "
            "(for a private model, log in with `hf auth login`)."
        ) from error
    except errors.HFValidationError as error:
        raise ModelLoadError(f"{source.name!r} is neither a path here nor a hub id.") from error
    except Exception as error:  # the network fails in the words of whichever library was on top
        raise ModelLoadError(
            f"{source.name} is no path here, and the hub did not answer "
            f"({type(error).__name__}); check the name and the network, or name a local folder."
        ) from error
    check_has_weights(folder)
    return folder


def _bar_class(progress: Progress | None, description: str) -> Any:
    """Return the hub's kind of progress bar, silent, whose bytes on disk go to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    tqdm_type: Any = tqdm

    class ReportingBar(tqdm_type):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = kwargs.pop("name", None)
            self.reports = progress is not None and name == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.reports and progress is not None:
                progress(description, int(self.n), int(self.total or 0))

    return ReportingBar
