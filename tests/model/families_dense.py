"""Dense rotary decoder families.

Knows: one tiny configuration per family.
Does not know: how a family is built or probed.
"""

from typing import Any

from tests.model.families_base import VOCABULARY, WINDOW, family

ALTERNATING = ["sliding_attention", "full_attention"] * 2
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "original_max_position_embeddings": 64,
}
# A base of 0 stands for a layer without rotation.
THETAS = [1e4, 0.0, 5e5, 1e3]
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
# Past 64 tokens plain transformers disagrees with its own cache: old keys keep the old table.
LENGTH_DEPENDENT = "the rotary table changes once a sequence is longer than 64: it ends there"
COMPLEX_TABLE = "the rotary table is complex, not (cos, sin)"
QUERY_SCALE = "queries are scaled by their position"
NORM_AFTER_ROPE = "keys are normalised, with a weight per dimension, after the rotation"
GEMMA4: dict[str, Any] = {
    "layer_types": ALTERNATING,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 32,
}
GEMMA4_PER_LAYER: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}

DENSE = (
    family("llama"),
    family("llama_mha", model_type="llama", num_key_value_heads=4, attention_bias=True),
    family("llama_mqa", model_type="llama", num_key_value_heads=1, head_dim=24),
    family("llama_llama3", model_type="llama", rope_parameters=LLAMA3),
    family("llama_yarn", model_type="llama", rope_parameters=YARN),
    family("llama_linear", model_type="llama", rope_parameters=LINEAR),
    family(
        "llama_dynamic",
        reason=LENGTH_DEPENDENT,
        model_type="llama",
        rope_parameters=DYNAMIC,
        max_position_embeddings=64,
    ),
    family("mistral", head_dim=32),
    family("ministral", layer_types=ALTERNATING),
    family(
        "ministral3",
        "absolute",
        QUERY_SCALE,
        rope_parameters=YARN
        | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16},
    ),
    family("qwen2"),
    family("qwen2_window", model_type="qwen2", use_sliding_window=True, max_window_layers=2),
    family("qwen3", head_dim=32),
    family("smollm3", no_rope_layer_interval=2),
    family("gemma", num_key_value_heads=1, head_dim=32),
    family("gemma2", head_dim=32, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    family("gemma3_text", head_dim=32, query_pre_attn_scalar=24, layer_types=ALTERNATING),
    family("vaultgemma", head_dim=32, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    family(
        "phi",
        num_key_value_heads=4,
        qk_layernorm=True,
        rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
    ),
    family("phi3", sliding_window=None),
    family("phi3_window", model_type="phi3"),
    family(
        "phi3_longrope",
        reason=LENGTH_DEPENDENT,
        model_type="phi3",
        sliding_window=None,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=64,
    ),
    family(
        "granite",
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    ),
    family(
        "granite_swa", layer_rope_theta=THETAS, attention_multiplier=0.2, layer_types=ALTERNATING
    ),
    family("olmo", clip_qkv=1.5),
    family("olmo2"),
    family(
        "olmo3",
        layer_types=ALTERNATING,
        rope_parameters={"sliding_attention": ROPE, "full_attention": YARN},
    ),
    family("starcoder2"),
    family("cohere", use_qk_norm=True, logit_scale=0.5),
    family("cohere2", logit_scale=0.5, layer_types=ALTERNATING),
    family(
        "cohere_compass_text",
        layer_types=ALTERNATING,
        logit_scale=0.5,
        rope_parameters={
            "sliding_attention": ROPE | {"mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    ),
    family("glm"),
    family("glm4"),
    family("gpt_neox"),
    family("stablelm", use_qkv_bias=True, qk_layernorm=True),
    family("nemotron"),
    family("persimmon"),
    family("helium"),
    family("exaone4", layer_types=ALTERNATING),
    family("ernie4_5"),
    family("hunyuan_v1_dense", "absolute", NORM_AFTER_ROPE),
    family("seed_oss", head_dim=24),
    family("arcee"),
    family("apertus"),
    family("bitnet"),
    family("cwm", layer_types=ALTERNATING),
    family("nanochat"),
    family("jais2"),
    family("internlm3", head_dim=24),
    family("iquestcoder", head_dim=24),
    family("hyperclovax", attention_multiplier=0.2),
    family(
        "modernbert-decoder",
        layer_types=ALTERNATING,
        local_attention=2 * WINDOW,
        pad_token_id=0,
        cls_token_id=3,
        sep_token_id=4,
    ),
    family("minicpm3", num_key_value_heads=4, scale_emb=2, dim_model_base=32),
    family("youtu", num_key_value_heads=4),
    family("gemma4_text", **GEMMA4, **GEMMA4_PER_LAYER),
    family("gemma4_unified_text", **GEMMA4),
    # Its window reaches the cache, but no mask: a cached run forgets what a whole pass sees.
    family("moshi", sliding_window=512),
)
