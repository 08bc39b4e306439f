"""What a model family entry is, and how a tiny random model is made from it.

Knows: the dimensions shared by every entry, and how weights are drawn so that mistakes show.
Does not know: any family, kvloom, or how a family is probed.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Expectation = Literal["movable", "opaque", "absolute", "refused"]

WINDOW = 16
VOCABULARY = 128

# Set wherever a configuration class declares the field; an entry's own values win.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # Older classes spell the same things differently.
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "n_positions": 512,
    "d_model": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
}

# Read by a configuration class from its keyword arguments, though not a field.
UNDECLARED = {"global_head_dim"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family by name, its tiny configuration, and what kvloom should be able to do with it.

    Args:
        expect: "movable" keys follow a rotary table or carry no position; "opaque" runs, but the
            table is not explained, so positions stay fixed; "absolute" runs, but its numbers depend
            on where a text starts; "refused" cannot run through the attention seam.
        reason: why it is not movable.
        full_forward_only: plain transformers disagrees with itself between one pass and two with
            its cache, so that only the whole pass is an oracle.
        says: words that the refusal holds; some for every refused family, none for the others.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    expect: Expectation
    reason: str = ""
    full_forward_only: bool = False
    says: str = ""


def family(
    name: str,
    expect: Expectation = "movable",
    reason: str = "",
    *,
    model_type: str | None = None,
    full_forward_only: bool = False,
    **own: Any,
) -> Family:
    """Describe a family by the configuration values that differ from the tiny ones."""
    config = partial(tiny_config, model_type or name, own)
    return Family(name, config, expect, reason, full_forward_only)


def saying(words: str, *entries: Family) -> tuple[Family, ...]:
    """Return families that are refused with these words."""
    return tuple(dataclasses.replace(entry, says=words) for entry in entries)


def tiny_config(model_type: str, own: dict[str, Any]) -> PreTrainedConfig:
    """Make the configuration of a model type, with the tiny dimensions and an entry's own values.

    Raises:
        TypeError: a value names no field of the configuration class (it would go unnoticed).
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    unknown = own.keys() - fields - UNDECLARED
    if unknown:
        raise TypeError(f"{config_class.__name__} has no field {sorted(unknown)}")
    tiny = {name: value for name, value in TINY.items() if name in fields}
    # Some classes complete the dictionaries they are given in place.
    return config_class(**copy.deepcopy(tiny | own))


def build(entry: Family, seed: int = 0) -> nn.Module:
    """Build the family's model in fp32 for evaluation; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            entry.config(), attn_implementation="eager", dtype=torch.float32
        )
        draw_weights(model)
    return model.eval()


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Redraw every stored tensor so that a wrong rope, window, bias, norm or sink changes logits.

    Matrices get about unit gain. What was made constant (norm weights, biases, sinks, gates)
    keeps its constant and gets noise, so that none of it is neutral.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if not tensor.is_floating_point():
            continue
        if tensor.dim() < 2 or tensor.min() == tensor.max():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
        else:
            tensor.normal_(0.0, min(0.2, 1.2 / math.sqrt(tensor.shape[-1])))
