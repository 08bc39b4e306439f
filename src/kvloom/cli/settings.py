"""The options that commands share: declared once, with their defaults and environment variables.

Knows: how options are spelled, and which part of kvloom each one is for.
Does not know: what the commands do with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvloom.config import DType, KVDType, parse_bytes
from kvloom.errors import RequestError

if TYPE_CHECKING:
    from kvloom.engine.assembly import Settings
    from kvloom.model.digest import Progress
    from kvloom.params import SamplingParams
    from kvloom.serve.config import ServerConfig

_MODEL_HELP = "`default`, a folder, a .gguf file or a hub id."


def size(text: str | int) -> int:
    """Return a size such as 2GiB in bytes, or a usage error."""
    try:
        return parse_bytes(text, "the size")
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error


ModelOption = Annotated[
    str, typer.Option("--model", "-m", envvar="KVLOOM_MODEL", metavar="MODEL", help=_MODEL_HELP)
]
ModelArgument = Annotated[
    str, typer.Argument(envvar="KVLOOM_MODEL", metavar="MODEL", help=_MODEL_HELP)
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        envvar="KVLOOM_CACHE",
        file_okay=False,
        show_default="the user's cache folder",
        help="Folder for converted models.",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        envvar="KVLOOM_STORE",
        file_okay=False,
        show_default="store in the user's cache folder",
        help="Folder of stored KV.",
    ),
]
DTypeOption = Annotated[
    DType, typer.Option(help="Of weights and activations; float32 is the reference.")
]
QuantizationOption = Annotated[
    Literal["auto", "none", "int8", "int4"],
    typer.Option(help="Of the weights; auto keeps what the file holds."),
]
KVDTypeOption = Annotated[KVDType, typer.Option("--kv-dtype", help="Of keys and values.")]
CpuLevelOption = Annotated[
    Literal["auto", "avx512", "avx2", "plain"], typer.Option(help="Of the compiled library.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, show_default="all cores", help="CPU threads.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    dtype: DTypeOption = "auto"
    quantization: QuantizationOption = "auto"
    kv_dtype: KVDTypeOption = "auto"
    cpu_level: CpuLevelOption = "auto"
    threads: ThreadsOption = None
    trust_remote_code: TrustOption = False
    cache_dir: CacheDirOption = None

    def load_settings(self, progress: Progress) -> Settings:
        """Return the keyword arguments of `LLM` that say how a model is loaded."""
        return {
            "dtype": self.dtype,
            "quantization": None if self.quantization == "none" else self.quantization,
            "kv_dtype": self.kv_dtype,
            "cpu_level": None if self.cpu_level == "auto" else self.cpu_level,
            "threads": self.threads,
            "trust_remote_code": self.trust_remote_code,
            "cache_dir": self.cache_dir,
            "progress": progress,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(LoadOptions):
    """How an engine is made."""

    kv_memory: Annotated[
        int,
        typer.Option(
            parser=size, metavar="SIZE", show_default="2GiB", help="KV memory, such as 512MiB."
        ),
    ] = 2 * 2**30
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, show_default="the model's own", help="Tokens a document may have."),
    ] = None
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching", help="Reuse the KV of equal beginnings."
        ),
    ] = True
    repair_when_idle: Annotated[
        bool,
        typer.Option(
            "--repair-when-idle/--no-repair-when-idle",
            help="Make edited documents exact while nothing else runs.",
        ),
    ] = True
    store: StoreOption = None
    no_store: Annotated[
        bool,
        typer.Option("--no-store", help="Keep no KV beyond this process, whatever else is set."),
    ] = False
    store_size: Annotated[
        int,
        typer.Option(parser=size, metavar="SIZE", show_default="8GiB", help="Size of that folder."),
    ] = 8 * 2**30
    store_remote: Annotated[
        str | None,
        typer.Option(
            envvar="KVLOOM_STORE_REMOTE",
            metavar="URL",
            show_default=False,
            help="A place that machines share: redis://..., or any address fsspec knows.",
        ),
    ] = None

    def settings(self, progress: Progress) -> Settings:
        """Return the keyword arguments of `LLM`."""
        from kvloom.engine.shelving import StoreSettings

        kept = StoreSettings(
            folder=self.store, disk_bytes=self.store_size, remote=self.store_remote
        )
        return {
            **self.load_settings(progress),
            "kv_memory": self.kv_memory,
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": self.prefix_caching,
            "repair_when_idle": self.repair_when_idle,
            "store": kept if self.prefix_caching and not self.no_store else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How an engine shares its time among requests."""

    step_tokens: Annotated[int, typer.Option(min=1, help="Rows of one forward pass.")] = 512
    max_running: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 64
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 1024

    def settings(self) -> Settings:
        """Return the keyword arguments of `AsyncLLM`."""
        return {
            "step_tokens": self.step_tokens,
            "max_running": self.max_running,
            "max_waiting": self.max_waiting,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens and what it lets in."""

    host: Annotated[str, typer.Option(help="Address; a public one needs an API key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = (
        8000
    )
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="KVLOOM_API_KEY",
            show_default=False,
            help="A key that requests must carry; may be given several times.",
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(show_default="the model's own", help="The model's name in the API."),
    ] = None
    max_body: Annotated[
        int,
        typer.Option(parser=size, metavar="SIZE", show_default="8MiB", help="Largest body read."),
    ] = 8 * 2**20
    max_documents: Annotated[
        int, typer.Option(min=0, help="Documents that are kept per API key.")
    ] = 256
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds running requests may take after a stop signal.")
    ] = 30.0

    def config(self, model_name: str) -> ServerConfig:
        """Return the server's settings.

        Raises:
            RequestError: a value is out of range.
        """
        from kvloom.serve.config import ServerConfig

        return ServerConfig(
            host=self.host,
            port=self.port,
            api_keys=tuple(self.api_key or ()),
            max_body_bytes=self.max_body,
            max_documents=self.max_documents,
            served_model_name=self.served_model_name or model_name,
            grace_s=self.grace,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How answers are drawn."""

    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the most likely token.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from this share of the probability.")
    ] = 1.0
    repetition_penalty: Annotated[
        float, typer.Option(min=0, help="Above 1, tokens that occurred become less likely.")
    ] = 1.0
    seed: Annotated[
        int | None, typer.Option(show_default="a new one", help="Makes draws repeatable.")
    ] = None

    def params(self) -> SamplingParams:
        """Return the parameters of a generation.

        Raises:
            RequestError: a value is out of range.
        """
        from kvloom.params import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
