"""Tiny models that tests write to disk: folders of safetensors, and GGUF files spelled by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "def add(left, right):\n    return left + right\n",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "Die Straße ist naß. Ça va? 日本語もあります。 🙂 and 👩‍👩‍👧",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 2


def byte_level_backend() -> Tokenizer:
    """Return a byte-level BPE tokenizer over all 256 bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>", "<|turn|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace_backend(prepend_scheme: str = "never") -> Tokenizer:
    """Return a SentencePiece-like tokenizer: spaces as U+2581, unknown characters as bytes."""
    first = Tokenizer(models.BPE())
    first.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        show_progress=False,
    )
    first.train_from_iterator(CORPUS[:2], trainer)

    content = json.loads(first.to_str())["model"]
    backend = Tokenizer(
        models.BPE(
            vocab=content["vocab"],
            merges=[tuple(pair) for pair in content["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend_scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def byte_level_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer as transformers wraps it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), bos_token="<|turn|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama that fits the byte-level tokenizer."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def write_folder(folder: Path, model: Any = None, tokenizer: Any = None, **save: Any) -> Path:
    """Save a model and a tokenizer as transformers does."""
    model = model if model is not None else tiny_llama()
    model.save_pretrained(folder, **save)
    (tokenizer if tokenizer is not None else byte_level_tokenizer()).save_pretrained(folder)
    return folder


def llama_cpp_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return query or key weights with rotary pairs side by side, as llama.cpp stores them."""
    rows = torch.arange(weight.shape[0]).reshape(heads, -1)
    half = rows.shape[1] // 2
    order = torch.stack([rows[:, :half], rows[:, half:]], dim=2).reshape(-1)
    return weight[order]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | None = None,
    *,
    pre: str = "gpt-2",
    without: tuple[str, ...] = (),
    numbers: dict[str, float] | None = None,
    texts: dict[str, str] | None = None,
    rope_factors: torch.Tensor | None = None,
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a Llama and its tokenizer as a GGUF file.

    Args:
        path: the file.
        model: weights and sizes.
        pre: name of the pre-tokenizer.
        without: names of tensors to leave out.
        numbers: further metadata, int or float.
        texts: further metadata, text.
        rope_factors: divisors of the rotary frequencies.
        quantised: how to store the matrices of the layers; None for fp32.
    """
    model = model if model is not None else tiny_llama()
    writer = gguf.GGUFWriter(path, "llama")
    _write_sizes(writer, model.config)
    _write_tokenizer(writer, pre)
    for key, number in (numbers or {}).items():
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(key, number)
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    tensors = gguf_tensors(model)
    if rope_factors is not None:
        tensors["rope_freqs.weight"] = rope_factors
    for name, tensor in tensors.items():
        if name in without:
            continue
        array = tensor.detach().float().contiguous().numpy()
        if quantised is not None and array.ndim == 2 and name.startswith("blk."):
            data = gguf.quantize(array, quantised)
            writer.add_tensor(name, data, raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return a Llama's weights under llama.cpp's names."""
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        block = {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": llama_cpp_order(attention.q_proj.weight, heads),
            "attn_k": llama_cpp_order(attention.k_proj.weight, kv_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        tensors |= {f"blk.{number}.{name}.weight": tensor for name, tensor in block.items()}
    return tensors


def _write_sizes(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:

    backend = byte_level_backend()
    vocab = sorted(backend.get_vocab(), key=backend.token_to_id)
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    special = {"<|end|>", "<|turn|>"}
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocab]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
