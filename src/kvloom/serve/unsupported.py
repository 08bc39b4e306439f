"""Fields of the OpenAI and vLLM APIs that are not supported yet, and the values that ask nothing.

Knows: names, and the values that mean "off" or "as usual" and are therefore accepted.
Does not know: the fields that are supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# A field is accepted only with a value listed here (or null); any other value is refused by name.
Harmless = Mapping[str, tuple[Any, ...]]

BOTH: Harmless = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
COMPLETION: Harmless = {
    **BOTH,
    "response_format": ({"type": "text"},),
}
CHAT: Harmless = {
    **BOTH,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MESSAGE: Harmless = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
INFILL: Harmless = {
    "adaptive_target": (-1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "id_slot": (-1,),
    "json_schema": (),
    "logit_bias": ([], {}),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_cache_reuse": (0,),
    "n_cmpl": (1,),
    "n_keep": (0, -1),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_last_n": (-1,),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
STREAM_OPTIONS: Harmless = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
TOKENIZE: Harmless = {"add_generation_prompt": (True,), "continue_final_message": (False,)}


def without_harmless(fields: Any, harmless: Harmless) -> Any:
    """Return the fields without those that ask nothing.

    Raises:
        PydanticCustomError: a field asks for something that is not supported yet.
    """
    if not isinstance(fields, dict):
        return fields
    rest = {}
    for name, value in fields.items():
        if name not in harmless:
            rest[name] = value
        elif value is not None and value not in harmless[name]:
            raise refusal(name, f"{name} is not supported yet; leave it out.")
    return rest


def refusal(param: str | None, message: str) -> PydanticCustomError:
    """Return the error that says what is wrong with a field.

    Args:
        param: the field inside the object under validation; None where a field's own validator
            raises, because pydantic then knows the place.
        message: what, why and what to do.
    """
    return PydanticCustomError("kvloom", message, {"param": param} if param else None)
