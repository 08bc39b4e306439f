"""Families that keep positions, keys or state in unusual places; kvloom runs few of them.

Knows: one tiny configuration per family, and the reason read from its modelling code.
Does not know: how a family is built or probed.
"""

from typing import Any

from tests.model.families_base import WINDOW, family, saying
from tests.model.families_dense import ALTERNATING, GEMMA4, GEMMA4_PER_LAYER

LEARNED = "learned absolute positions are part of the hidden states"
ALIBI = "positions are biases on the scores, added by attention code of its own"
OWN = "attention code of its own, not the attention interface"
RECURRENT = "recurrent or convolution state beside or instead of keys and values"
SPARSE_INDEX = "an indexer of its own picks the keys a query sees"
SHARED = "the last layers are handed the keys of earlier ones: stored twice, but right"
VALUE_MASK = "a mask made of the values is added to the scores"
UNTOLD = "a window reaches the mask only, never the attention function"
REPEATED = "one attention module is called several times per pass"
COUNTED = "positions are counted in the call, position_ids do not reach them"
LATE = "positions counted by the model start after the padding id, not at 0"
# What a refusal says it is for.
NEVER_CALLED = "never calls transformers' AttentionInterface"
OTHER_MASK = "neither causal nor a window"
OWN_MASK = "adds something of its own to its mask"
OTHER_ATTENTION = "its attention uses something kvloom does not know"
OTHER_STEPS = "keeps state outside of its attention"
MAMBA_EVERY_OTHER = ["linear_attention", "full_attention"] * 2
CONVOLUTION_EVERY_OTHER = ["conv", "full_attention"] * 2
UNGROUPED: dict[str, Any] = {"num_key_value_heads": 4}
INDEX: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
# So many keys that a short text never shows the choice among them.
FAR_INDEX = INDEX | {"index_topk": 256}
BLOCK_INDEX: dict[str, Any] = {
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
LINEAR_STATE: dict[str, Any] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2: dict[str, Any] = MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16}

ABSOLUTE = (
    family("gpt2", "absolute", LEARNED),
    family("gpt_bigcode", "absolute", LEARNED),
    family("opt", "absolute", LEARNED, ffn_dim=96),
    family("biogpt", "absolute", LEARNED),
    family("ctrl", "absolute", LEARNED, dff=96),
    family("bert", "absolute", LEARNED, is_decoder=True),
    family("bert-generation", "absolute", LEARNED, is_decoder=True),
    family("electra", "absolute", LEARNED, is_decoder=True),
    family("ernie", "absolute", LEARNED, is_decoder=True),
    family("whisper", "absolute", LEARNED),
)

SHARING = (
    family(
        "gemma3n_text",
        reason=SHARED,
        layer_types=ALTERNATING,
        num_kv_shared_layers=2,
        laurel_rank=8,
        **GEMMA4_PER_LAYER,
    ),
    family(
        "gemma4_text_shared",
        reason=SHARED,
        model_type="gemma4_text",
        num_kv_shared_layers=2,
        **GEMMA4,
        **GEMMA4_PER_LAYER,
    ),
)

# Right, though it does not look so: the probe reads masks, and tells layers apart by their calls.
MISLEADING = (
    family("phimoe_window", reason=UNTOLD, model_type="phimoe"),
    family("phimoe_window_far", reason=UNTOLD, model_type="phimoe", sliding_window=256),
    family("diffllama", reason=REPEATED),
    family("hrm_text", reason=REPEATED, num_hidden_layers=2, prefix_lm=False),
)

CHUNKED = saying(
    OTHER_MASK,
    family(
        "llama4_text",
        "refused",
        COUNTED,
        interleave_moe_layer_step=2,
        intermediate_size_mlp=96,
        no_rope_layer_interval=2,
        attention_chunk_size=WINDOW,
        floor_scale=8,
        attn_scale=0.5,
    ),
    # The same out of reach of a short probe.
    family(
        "llama4_text_far",
        "refused",
        COUNTED,
        model_type="llama4_text",
        intermediate_size_mlp=96,
        no_rope_layer_interval=2,
        attention_chunk_size=256,
        floor_scale=256,
    ),
)

INDEXED = saying(
    OTHER_ATTENTION,
    *(
        family(name, "refused", SPARSE_INDEX, full_forward_only=True, **INDEX, **UNGROUPED)
        for name in ("axk2", "hy_v4", "dots3_note_text")
    ),
    *(
        family(
            name,
            "refused",
            SPARSE_INDEX,
            full_forward_only=True,
            first_k_dense_replace=1,
            **INDEX,
            **UNGROUPED,
        )
        for name in ("deepseek_v32", "glm_moe_dsa")
    ),
    family(
        "minimax_m3_sparse",
        "refused",
        SPARSE_INDEX,
        model_type="minimax_m3_vl_text",
        index_block_size=8,
        index_topk_blocks=2,
        **BLOCK_INDEX,
    ),
)

# As the real checkpoints are: nothing is left out of a text as short as the probe's.
INDEXED_FAR = saying(
    OTHER_STEPS,
    *(
        family(f"{name}_far", "refused", SPARSE_INDEX, model_type=name, **FAR_INDEX, **UNGROUPED)
        for name in ("axk2", "hy_v4", "dots3_note_text", "deepseek_v32", "glm_moe_dsa")
    ),
    *(
        family(
            f"minimax_m3_sparse_{size}",
            "refused",
            SPARSE_INDEX,
            model_type="minimax_m3_vl_text",
            index_block_size=size,
            index_topk_blocks=topk,
            **BLOCK_INDEX,
        )
        for size, topk in ((8, 16), (64, 4))
    ),
)

MASK_MAKERS = saying(
    OWN_MASK,
    family("doge", "refused", VALUE_MASK, full_forward_only=True, keep_window_size=8),
    family("doge_far", "refused", VALUE_MASK, model_type="doge", keep_window_size=256),
    family("deepseek_v4", "refused", SPARSE_INDEX),
    family(
        "qwen4_exp_text",
        "refused",
        SPARSE_INDEX,
        layer_types=["linear_attention", "indexed_attention"] * 2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_lowrank=8,
        hc_count=2,
        **LINEAR_STATE,
    ),
)

UNREACHED = saying(
    NEVER_CALLED,
    family("gpt_neox_japanese", "refused", OWN),
    family(
        "gpt_neo",
        "refused",
        OWN,
        num_layers=4,
        num_heads=4,
        window_size=WINDOW,
        attention_types=[[["global", "local"], 2]],
    ),
    family("gptj", "refused", OWN, rotary_dim=8),
    family("codegen", "refused", OWN, rotary_dim=8),
    family("openai-gpt", "refused", OWN, full_forward_only=True),
    family("xglm", "refused", OWN, num_layers=4, attention_heads=4, ffn_dim=96),
    family("falcon", "refused", OWN, new_decoder_architecture=True, num_kv_heads=2),
    family("falcon_alibi", "refused", ALIBI, model_type="falcon", alibi=True),
    family("bloom", "refused", ALIBI),
    family("mpt", "refused", ALIBI, n_layers=4, n_heads=4),
    family("megatron-bert", "refused", OWN, is_decoder=True),
    family("rembert", "refused", OWN, is_decoder=True),
    family("roformer", "refused", OWN, is_decoder=True),
    family("big_bird", "refused", OWN, is_decoder=True),
    family("trocr", "refused", OWN),
    family("xlnet", "refused", OWN, full_forward_only=True),
    family("cpmant", "refused", OWN, full_forward_only=True),
)

# Decoders cut from encoder-decoder models: position_ids are no argument of theirs, or start late.
MISCOUNTED = saying(
    OTHER_STEPS,
    family("bart", "refused", COUNTED, full_forward_only=True),
    family("mbart", "refused", COUNTED, full_forward_only=True),
    family("plbart", "refused", COUNTED, full_forward_only=True),
    family("blenderbot", "refused", COUNTED, full_forward_only=True),
    family("blenderbot-small", "refused", COUNTED, full_forward_only=True),
    family("pegasus", "refused", COUNTED, full_forward_only=True),
    family("marian", "refused", COUNTED, full_forward_only=True),
    family("bigbird_pegasus", "refused", COUNTED, full_forward_only=True),
    family("roberta", "refused", LATE, is_decoder=True, pad_token_id=1),
    family("xlm-roberta", "refused", LATE, is_decoder=True, pad_token_id=1),
)

STATE_ONLY = saying(
    NEVER_CALLED,
    family("mamba", "refused", RECURRENT, full_forward_only=True, state_size=8),
    family(
        "mamba2",
        "refused",
        RECURRENT,
        full_forward_only=True,
        num_heads=8,
        state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    family("falcon_mamba", "refused", RECURRENT, full_forward_only=True, state_size=8),
    family("rwkv", "refused", RECURRENT, full_forward_only=True),
    family("xlstm", "refused", RECURRENT, full_forward_only=True, chunk_size=16),
)

STATEFUL = saying(
    OTHER_STEPS,
    family(
        "jamba",
        "refused",
        RECURRENT,
        full_forward_only=True,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
    ),
    family(
        "bamba", "refused", RECURRENT, full_forward_only=True, attn_layer_indices=[1, 3], **MAMBA2
    ),
    family(
        "zamba2",
        "refused",
        RECURRENT,
        full_forward_only=True,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        n_mamba_heads=8,
        chunk_size=16,
        mamba_d_state=8,
        num_key_value_heads=4,
        use_mem_rope=True,
    ),
    family(
        "zamba",
        "refused",
        RECURRENT,
        full_forward_only=True,
        num_hidden_layers=5,
        layers_block_type=["linear_attention", "hybrid"] * 2 + ["linear_attention"],
        mamba_d_state=8,
        **UNGROUPED,
    ),
    family("falcon_h1", "refused", RECURRENT, mamba_d_ssm=128, **MAMBA2),
    family(
        "nemotron_h",
        "refused",
        RECURRENT,
        layers_block_type=["linear_attention", "full_attention", "mlp", "full_attention"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        full_forward_only=True,
    ),
    family("granitemoehybrid", "refused", RECURRENT, layer_types=MAMBA_EVERY_OTHER, **MAMBA2),
    family(
        "recurrent_gemma",
        "refused",
        RECURRENT,
        full_forward_only=True,
        attention_window_size=WINDOW,
        block_types=("recurrent", "attention"),
    ),
    family("lfm2", "refused", RECURRENT, layer_types=CONVOLUTION_EVERY_OTHER),
    family("lfm2_moe", "refused", RECURRENT, layer_types=CONVOLUTION_EVERY_OTHER),
    family(
        "lfm3",
        "refused",
        RECURRENT,
        layer_types=["conv", "full_attention", "conv", "sliding_attention"],
    ),
    family("zaya", "refused", RECURRENT, num_experts_per_tok=1, router_hidden_size=16),
    family("minimax", "refused", RECURRENT, block_size=16, full_forward_only=True),
    family("qwen3_next", "refused", RECURRENT, layer_types=MAMBA_EVERY_OTHER, **LINEAR_STATE),
    family("qwen3_5_text", "refused", RECURRENT, layer_types=MAMBA_EVERY_OTHER, **LINEAR_STATE),
    family("qwen3_5_moe_text", "refused", RECURRENT, layer_types=MAMBA_EVERY_OTHER, **LINEAR_STATE),
    family("olmo_hybrid", "refused", RECURRENT, layer_types=MAMBA_EVERY_OTHER, **LINEAR_STATE),
    family(
        "kimi_linear",
        "refused",
        RECURRENT,
        layer_types=MAMBA_EVERY_OTHER,
        linear_head_dim=16,
        linear_num_heads=4,
        **UNGROUPED,
    ),
    family("bailing_hybrid", "refused", RECURRENT, layer_group_size=2, **UNGROUPED),
)

STATE_AND_BIAS = saying(
    OTHER_ATTENTION,
    family(
        "inkling_text",
        "refused",
        RECURRENT,
        logits_mup_width_multiplier=1.0,
        sliding_window_size=WINDOW,
        local_layer_ids=[0, 2],
    ),
    family("inkling2_text", "refused", RECURRENT, sliding_window_size=WINDOW),
)

OTHER = (
    ABSOLUTE
    + SHARING
    + MISLEADING
    + CHUNKED
    + INDEXED
    + INDEXED_FAR
    + MASK_MAKERS
    + UNREACHED
    + MISCOUNTED
    + STATE_ONLY
    + STATEFUL
    + STATE_AND_BIAS
)
