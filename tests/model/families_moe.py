"""Rotary decoder families with mixtures of experts.

Knows: one tiny configuration per family.
Does not know: how a family is built or probed.
"""

from typing import Any

from tests.model.families_base import family
from tests.model.families_dense import (
    ALTERNATING,
    COMPLEX_TABLE,
    NORM_AFTER_ROPE,
    QUERY_SCALE,
    ROPE,
    THETAS,
    YARN,
)

SPARSE = ["dense", "sparse", "sparse", "sparse"]
# Latent attention expands to one key per query head.
UNGROUPED: dict[str, Any] = {"num_key_value_heads": 4}

MOE = (
    family("mixtral", sliding_window=None),
    family("mixtral_window", model_type="mixtral"),
    family("qwen2_moe"),
    family("qwen3_moe", use_sliding_window=True),
    family("phimoe", sliding_window=None),
    family("granitemoe", attention_multiplier=0.2),
    family("granitemoeshared", attention_multiplier=0.2, shared_intermediate_size=32),
    family(
        "granitemoe_swa",
        layer_rope_theta=THETAS,
        attention_multiplier=0.2,
        shared_intermediate_size=32,
        layer_types=ALTERNATING,
    ),
    family("olmoe", clip_qkv=1.5),
    family("flex_olmo"),
    family("glm4_moe", use_qk_norm=True),
    family("glm4_moe_lite", **UNGROUPED),
    family("gpt_oss", layer_types=ALTERNATING),
    family("ernie4_5_moe", moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    family("hunyuan_v1_moe", "absolute", NORM_AFTER_ROPE, moe_topk=2),
    family("deepseek_v2", "opaque", COMPLEX_TABLE, first_k_dense_replace=1, **UNGROUPED),
    family("deepseek_v3", first_k_dense_replace=1, **UNGROUPED),
    family(
        "deepseek_v3_yarn",
        model_type="deepseek_v3",
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        rope_interleave=False,
        **UNGROUPED,
    ),
    family("dots1", layer_types=ALTERNATING, first_k_dense_replace=1),
    family("jetmoe", kv_channels=16),
    family("afmoe", layer_types=ALTERNATING),
    family("aria_text", moe_num_experts=4),
    family("axk1", **UNGROUPED),
    family("beam", "absolute", QUERY_SCALE, layer_types=ALTERNATING, mlp_layer_types=SPARSE),
    family("cohere2_moe", layer_types=ALTERNATING, logit_scale=0.5),
    family("exaone_moe", layer_types=ALTERNATING),
    family("flint", layer_types=ALTERNATING),
    family("hy_v3"),
    family("kolibri1", layer_types=ALTERNATING),
    family("laguna", layer_types=ALTERNATING, num_attention_heads_per_layer=[4, 8, 4, 8]),
    family(
        "longcat_flash",
        num_layers=2,
        moe_topk=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        zero_expert_num=2,
        head_dim=8,
        **UNGROUPED,
    ),
    family("mellum", layer_types=ALTERNATING),
    family("mimo_v2_flash", layer_types=ALTERNATING, head_dim=24),
    family("minimax_m2"),
    family("minimax_m3_vl_text"),
    family("solar_open"),
    family(
        "dbrx",
        rope_parameters=ROPE,
        attn_config={"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        n_heads=4,
        n_layers=4,
        max_seq_len=512,
    ),
)
