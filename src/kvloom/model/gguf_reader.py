"""Reads a GGUF file with transformers and writes it out as dequantised safetensors.

Knows: how transformers reads GGUF, and which facts of a file it leaves unread.
Does not know: where the result is kept, or when to make it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.errors import KvloomError, ModelLoadError, UnsupportedModelError
from kvloom.model.digest import Progress
from kvloom.model.quiet import quiet_transformers

_log = logging.getLogger(__name__)

# Facts that change a model's numbers; a file that states one must find it in the config.
_NUMERIC_FACTS = (
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.freq_base",
    "rope.scaling.factor",
)
# Byte-level vocabularies whose merges were learned with every digit on its own.
# Source: llama.cpp, the pre-tokenizer types that share the expression \p{N}.
_DIGITS_APART = frozenset(
    {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
)
_PLAIN_BYTE_LEVEL = frozenset({"", "default", "gpt-2", "gpt2"})


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF file states, apart from its vocabulary and weights.

    Attributes:
        metadata: every scalar, by its full key.
        rope_factors: divisors of the rotary frequencies (Llama 3); None if the file holds none.
    """

    metadata: Mapping[str, Any]
    rope_factors: tuple[float, ...] | None

    def of_model(self, key: str) -> Any:
        """Return a value from the architecture's own section; None if it is not stated."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")


def read_gguf(gguf: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write config, tokenizer, chat template and fp32 weights of a GGUF file into a folder.

    Raises:
        ModelLoadError: the file is damaged, or transformers cannot read it.
        UnsupportedModelError: transformers would leave out facts that change the numbers.
        OSError: the folder cannot be written.
    """
    try:
        facts = read_facts(gguf, progress)
        tokenizer = _read_tokenizer(gguf, facts, progress)
        model = _read_model(gguf, progress)
        _restore_rope_factors(model, facts)
        _check_facts(model.config, facts)
        _add_end_of_turn(model.generation_config, facts)
    except (KvloomError, MemoryError):
        raise
    except Exception as error:  # the readers raise whatever a broken byte leads to
        raise ModelLoadError(
            f"{gguf.name} cannot be read as GGUF: {type(error).__name__}: {error}; "
            "the file is damaged or of a kind that transformers does not read."
        ) from error
    _check_room(model, folder)
    with quiet_transformers(progress, "Writing weights"):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, safe_serialization=True)


def read_facts(gguf: Path, progress: Progress | None = None) -> GgufFacts:
    """Read a file's metadata and check that its tensors are all there.

    Raises:
        ModelLoadError: the file ends before its last tensor.
    """
    from gguf import GGUFReader, GGUFValueType

    if progress is not None:
        progress("Reading metadata", 0, 1)
    reader = GGUFReader(gguf)
    end = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    size = gguf.stat().st_size
    if size < end or not reader.tensors:
        raise ModelLoadError(
            f"{gguf.name} has {size} bytes and its tensors need {end}; download it again."
        )
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY
    }
    architecture = metadata.get("general.architecture")
    largest = max(int(size) for tensor in reader.tensors for size in tensor.shape)
    for key, limit in (
        ("block_count", len(reader.tensors)),
        ("embedding_length", largest),
        ("feed_forward_length", largest),
    ):
        stated = metadata.get(f"{architecture}.{key}")
        if isinstance(stated, int) and stated > limit:  # would be built before it failed
            raise ModelLoadError(f"{gguf.name} states {key} = {stated}, which its tensors belie.")
    factors = {tensor.name: tensor for tensor in reader.tensors}.get("rope_freqs.weight")
    if progress is not None:
        progress("Reading metadata", 1, 1)
    return GgufFacts(
        metadata=metadata,
        rope_factors=None if factors is None else tuple(float(value) for value in factors.data),
    )


def _read_tokenizer(gguf: Path, facts: GgufFacts, progress: Progress | None) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with quiet_transformers(progress, "Reading the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
    kind = str(facts.metadata.get("tokenizer.ggml.pre", ""))
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        if kind in _DIGITS_APART:  # transformers does not know these names
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif kind not in _PLAIN_BYTE_LEVEL:
            _log.warning(
                "%s was made with the pre-tokenizer %r, which transformers does not know; "
                "text is cut into tokens as for GPT-2",
                gguf.name,
                kind,
            )
    if progress is not None:
        progress("Reading the tokenizer", 1, 1)
    return tokenizer


def _read_model(gguf: Path, progress: Progress | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    auto: Any = AutoModelForCausalLM
    with quiet_transformers(progress, "Dequantising weights"):
        model, loaded = auto.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{gguf.name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}); "
            "the file is incomplete, or its architecture is not what it says."
        )
    # transformers refuses to save a model whose config still says that it is quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _restore_rope_factors(model: Any, facts: GgufFacts) -> None:
    """Put Llama 3's frequency scaling into the config, where the file has it as a tensor.

    llama.cpp stores the factors and not what they were computed from, so the parameters that
    Meta published are tried, and accepted if they give the very same factors.
    """
    if facts.rope_factors is None:
        return
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model.config
    stated = torch.tensor(facts.rope_factors)
    plain = dict(config.rope_parameters)
    dims = 2 * len(stated)
    frequencies = plain["rope_theta"] ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    config.rope_parameters = plain | {
        "rope_type": "llama3",
        "factor": float(stated.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not torch.allclose(scaled, frequencies / stated, rtol=1e-4, atol=0):
        raise UnsupportedModelError(
            "the file scales its rotary frequencies in a way that transformers does not read, "
            "so the numbers would be wrong; use the model's safetensors."
        )


def _check_facts(config: Any, facts: GgufFacts) -> None:
    """Refuse a file that states something the config read from it does not hold."""
    held = list(_numbers(config.to_dict()))
    for key in _NUMERIC_FACTS:
        stated = facts.of_model(key)
        if not isinstance(stated, int | float) or stated in (0, 1):
            continue  # not stated, switched off, or without effect
        if key == "attention.key_length" and stated == getattr(config, "head_dim", stated):
            continue
        if not any(math.isclose(stated, value, rel_tol=1e-5) for value in held):
            raise UnsupportedModelError(
                f"the file states {key} = {stated}, which transformers does not read from GGUF, "
                "so the numbers would be wrong; use the model's safetensors."
            )
    scaling = facts.of_model("rope.scaling.type")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling not in (None, "none") and kind == "default":
        raise UnsupportedModelError(
            f"the file scales rotary positions ({scaling}), which transformers does not read "
            "from GGUF for this architecture; use the model's safetensors."
        )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _add_end_of_turn(generation_config: Any, facts: GgufFacts) -> None:
    """Let a chat model stop at the end of its turn, which GGUF names apart from the end of text."""
    end_of_turn = facts.metadata.get("tokenizer.ggml.eot_token_id")
    known = generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    if end_of_turn is not None and end_of_turn not in known:
        ids = [token for token in known if token is not None]
        generation_config.eos_token_id = [*ids, int(end_of_turn)]


def _check_room(model: Any, folder: Path) -> None:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelLoadError(
            f"the dequantised weights need {needed / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB left; make room or choose another cache folder."
        )
