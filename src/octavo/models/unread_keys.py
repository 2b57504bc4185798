"""The keys of a config.json that octavo does not read: they may describe what it does not compute.

A key is read if a value that no reader accepts is an error. That needs no list of what each family reads, which could
be wrong. Keys that cannot change the numbers of a pass are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import ModelError

UNREADABLE = object()
NESTED = ("text_config", "rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
# Keys that say nothing of the numbers: tokens, defaults of training, outputs of transformers, who wrote the file. All
# dropouts are left out: octavo has LoRA's alone.
_NAMES = """
    _attn_implementation _commit_hash _name_or_path _sliding_window_pattern add_cross_attention architectures
    attention_types auto_map bad_words_ids begin_suppress_tokens boi_token_index bos_token_id cache_implementation
    chunk_size_feed_forward compression_config cross_attention_hidden_size decoder_start_token_id dtype
    early_stopping eoi_token_index eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id generation_config gradient_checkpointing id2label image_token_id image_token_index
    initializer_factor initializer_range is_decoder is_encoder_decoder label2id language license
    max_position_embeddings mm_tokens_per_image model_max_length multimodal_projector_bias num_return_sequences
    octavo output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type projector_hidden_act quantization quantization_config remove_invalid_values
    reorder_and_upcast_attn return_dict return_dict_in_generate sep_token_id spatial_merge_size suppress_tokens
    task_specific_params tf_legacy_loss tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache vision_config
    vision_feature_layer
"""
NO_EFFECT = frozenset(_NAMES.split())
NO_EFFECT_ENDS = ("_pdrop", "dropout", "_dropout", "_dropout_prob")
NO_EFFECT_STARTS = ("summary_", "transformers.js")


def unread_keys(config: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    """The keys, those of nested objects as "rope_parameters.factor", that `parse` does not read and that may matter.

    `parse` reads a config.json, or raises ModelError.
    """
    return sorted(key for key in _unread(config, parse) if not _has_no_effect(key.rpartition(".")[2]))


def _unread(config: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    found = []
    for key, value in config.items():
        if value is None or _has_no_effect(key):
            continue
        if key in NESTED and isinstance(value, Mapping):
            inner = _unread(value, lambda part, key=key: parse({**config, key: part}))  # type: ignore[misc]
            found += [f"{key}.{name}" for name in inner]
        elif not _is_read(config, key, parse):
            found.append(key)
    return found


def _is_read(config: Mapping[str, Any], key: str, parse: Callable[[Mapping[str, Any]], Any]) -> bool:
    try:
        parse({**config, key: UNREADABLE})
    except ModelError:
        return True
    return False


def _has_no_effect(key: str) -> bool:
    return key in NO_EFFECT or key.endswith(NO_EFFECT_ENDS) or key.startswith(NO_EFFECT_STARTS)
