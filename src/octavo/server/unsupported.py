"""Request fields of other servers: rejected if they would change the output, accepted if they have no effect.

OpenAI, vLLM, SGLang, TGI, llama.cpp, Ollama, text-generation-webui, Mistral, OpenRouter and others have about 200
fields that octavo does not support. A field that would change the output gets a 400 with its name, unless its value is
neutral. A field in HARMLESS is accepted. An unknown field is ignored and logged once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from octavo.server.errors import ApiError, bad_request
from octavo.server.requests import (
    ArticleRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Detokenize,
    LoadAdapter,
    PlainText,
    StreamOptions,
    TextPart,
    TokenizeChat,
    TokenizeText,
    UnloadAdapter,
)

REJECTED_MARK = "x-refused"  # marks rejected fields in the OpenAPI schema
LOG = logging.getLogger("octavo.server")
MAX_LOGGED = 64  # unknown fields: bounds the log and the memory if a client invents names
MAX_NAME_LENGTH = 60
MAX_UNKNOWN = 256  # unknown fields of one object: each is checked

OFF = (False, 0)
EMPTY: tuple[object, ...] = ([], {}, "")
ONE = (1,)
NEVER: tuple[object, ...] = ()  # only null is neutral
NO_THINKING = (False, 0, {"type": "disabled"})
# The prompt fields of the routes. On another route such a field is unknown, not an unsupported parameter.
PROMPTS = frozenset(("prompt", "messages", "input"))
# Neutral values of fields that other octavo routes have.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "stream": OFF, "stream_options": EMPTY, "n": ONE, "echo": OFF, "top_p": ONE, "top_k": (*OFF, -1),
    "logprobs": (False,), "repetition_penalty": ONE, "stop": EMPTY, "top_logprobs": OFF,
}  # fmt: skip

Row = tuple[str, dict[str, tuple[object, ...]]]
# (message, {field: its neutral values in addition to null})
EVERY_ROUTE: tuple[Row, ...] = (
    ("The output is free text.", {
        "structured_outputs": EMPTY, "structural_tag": EMPTY, "guided_json": NEVER, "guided_regex": ("",),
        "guided_choice": EMPTY, "guided_grammar": ("",), "guided_decoding_backend": ("",),
        "guided_whitespace_pattern": NEVER, "grammar": EMPTY, "grammar_string": ("",), "grammar_lazy": OFF,
        "grammar_triggers": EMPTY, "preserved_tokens": EMPTY, "json_schema": NEVER, "schema": NEVER, "regex": ("",),
        "ebnf": ("",), "format": EMPTY, "text_format": NEVER, "response_schema": NEVER, "force_json": OFF,
        "response_format": EMPTY, "output_config": EMPTY,
    }),
    ("Use `max_tokens`.", {
        "max_new_tokens": NEVER, "n_predict": NEVER, "num_predict": NEVER, "max_length": NEVER, "max_gen_len": NEVER,
        "max_output_tokens": NEVER, "max_tokens_to_sample": NEVER, "max_completion_tokens": NEVER,
    }),
    ("Use `stop` with strings.", {
        "stop_token_ids": EMPTY, "stop_sequences": EMPTY, "stop_strings": EMPTY, "stop_words": EMPTY,
        "stop_regex": EMPTY, "stop_token": EMPTY, "stop_tokens": EMPTY, "custom_stopping_strings": EMPTY,
        "stopping_strings": EMPTY,
        "include_stop_str_in_output": OFF, "no_stop_trim": OFF,
    }),
    ("Generation ends at the EOS token or at `max_tokens`.", {
        "ignore_eos": OFF, "ban_eos_token": OFF, "min_tokens": OFF, "min_new_tokens": OFF, "min_length": OFF,
        "n_indent": OFF, "t_max_predict_ms": (0, -1), "max_time": NEVER, "exponential_decay_length_penalty": NEVER,
        "forced_bos_token_id": NEVER, "forced_eos_token_id": NEVER, "thinking_token_budget": NEVER,
    }),
    ("Banning or forcing tokens is not supported.", {
        "bad_words": EMPTY, "bad_words_ids": EMPTY, "allowed_token_ids": EMPTY, "logit_bias_exp": EMPTY,
        "banned_tokens": EMPTY, "custom_token_bans": EMPTY, "banned_strings": EMPTY, "sequence_bias": EMPTY,
        "suppress_tokens": EMPTY, "begin_suppress_tokens": EMPTY, "logits_processors": EMPTY,
        "logits_processor": EMPTY, "custom_logit_processor": EMPTY, "vllm_xargs": EMPTY, "custom_params": EMPTY,
        "watermark": OFF, "logit_bias": EMPTY,
    }),
    ("Sampling here has temperature, top_p, top_k and repetition_penalty.", {
        "min_p": OFF, "typical_p": (1, 0), "typical": (1, 0), "top_a": OFF, "tfs": ONE, "tfs_z": ONE, "top_h": OFF,
        "top_n_sigma": (-1, 0), "epsilon_cutoff": OFF, "eta_cutoff": OFF, "smoothing_factor": OFF,
        "dynamic_temperature": OFF, "dynatemp_range": OFF, "temperature_last": OFF, "mirostat": OFF,
        "mirostat_mode": OFF, "xtc_probability": OFF, "dry_multiplier": OFF, "adaptive_target": (-1, 0),
        "adaptive_p": NEVER, "no_repeat_ngram_size": OFF, "encoder_repetition_penalty": ONE,
        "penalty_alpha": OFF, "guidance_scale": ONE, "negative_prompt": ("",), "samplers": EMPTY,
        "sampler_priority": EMPTY, "sampler_order": EMPTY, "sampler_seed": NEVER, "repetition_detection": NEVER,
        "penalty_prompt": NEVER, "frequency_penalty": OFF, "presence_penalty": OFF, "freq_pen": OFF, "pres_pen": OFF,
        "repetition_penalty_range": OFF, "rep_pen_range": OFF, "rep_pen_slope": OFF, "repeat_last_n": (-1,),
        "preset": ("",),
    }),
    ("Use `repetition_penalty`.", {
        "repeat_penalty": ONE, "rep_pen": ONE, "penalty": ONE, "penalize_nl": OFF,
    }),
    ("Set `temperature` to 0 for greedy decoding.", {"do_sample": (True,), "greedy": OFF}),
    ("Beam search is not supported. Use `n` for several choices.", {
        "use_beam_search": OFF, "num_beams": ONE, "beam_width": ONE, "num_beam_groups": ONE, "diversity_penalty": OFF,
        "length_penalty": ONE, "early_stopping": OFF, "best_of": ONE, "num_return_sequences": ONE,
    }),
    ("Use `seed`.", {"random_seed": NEVER}),
    ("Use `logprobs`; for the prompt's, also set `echo` on /v1/completions.", {
        "prompt_logprobs": (False,), "n_probs": OFF, "decoder_input_details": OFF, "details": OFF,
        "top_n_tokens": OFF, "return_logprob": OFF, "logprob_start_len": (-1,), "top_logprobs_num": OFF,
        "token_ids_logprob": EMPTY, "logprob_token_ids": EMPTY, "post_sampling_probs": OFF,
        "logprobs_mode": ("raw_logprobs",),
    }),
    ("The response has OpenAI's fields only.", {
        "return_token_ids": OFF, "return_tokens": OFF, "return_tokens_as_token_ids": OFF, "return_full_text": OFF,
        "return_hidden_states": OFF, "return_text_in_logprobs": OFF, "response_fields": EMPTY, "timings_per_token": OFF,
        "return_progress": OFF, "verbose": OFF, "skip_special_tokens": (True,), "detokenize": (True,),
        "spaces_between_special_tokens": (True,), "clean_up_tokenization_spaces": OFF,
    }),
    ("Prompts are tokenized as /tokenize does and never truncated.", {
        "truncate_prompt_tokens": NEVER, "truncate": NEVER, "truncation": ("disabled", False), "truncation_side": NEVER,
        "add_special_tokens": (True,), "add_bos_token": (True,), "add_special": (True,), "parse_special": OFF,
        "prefix_token_id": NEVER, "auto_max_new_tokens": OFF, "prompt_lookup_num_tokens": OFF, "transforms": EMPTY,
        "num_ctx": NEVER, "max_context_length": NEVER, "rope_freq_base": NEVER, "rope_freq_scale": NEVER,
    }),
    ("Set `model` to the name of an adapter.", {
        "lora": EMPTY, "lora_request": NEVER, "lora_path": NEVER, "lora_name": NEVER, "lora_id": NEVER,
        "adapter": NEVER, "adapters": EMPTY, "adapter_id": NEVER, "adapter_source": NEVER, "adapter_parameters": EMPTY,
        "models": EMPTY, "base_model": NEVER,
    }),
    ("The model's own chat template is always used, with a generation prompt.", {
        "chat_template": NEVER, "chat_template_kwargs": EMPTY, "continue_final_message": OFF,
        "add_generation_prompt": (True,), "template": NEVER, "instruction_template": NEVER,
        "instruction_template_str": NEVER, "chat_template_str": NEVER, "character": NEVER, "mode": NEVER, "raw": OFF,
        "continue_": OFF, "context": NEVER, "bot_name": NEVER, "user_name": NEVER, "tool_prompt": NEVER,
        "chat_format": NEVER, "jinja": NEVER,
    }),
    ("Send the prompt as text or token ids in `prompt` or `messages`.", {
        "documents": EMPTY, "prompt_embeds": EMPTY, "input_embeds": EMPTY, "input_ids": EMPTY, "inputs": NEVER,
        "text": NEVER, "system": ("",), "system_prompt": ("",), "instructions": ("",), "images": EMPTY,
        "image_data": EMPTY, "audio_data": EMPTY, "video_data": EMPTY, "multi_modal_data": EMPTY,
        "multimodal_data": EMPTY, "mm_processor_kwargs": EMPTY, "media_io_kwargs": EMPTY, "input_prefix": ("",),
        "input_suffix": ("",), "input_extra": EMPTY, "suffix": ("",), "memory": ("",), "file_ids": EMPTY,
        "conversation": NEVER, "previous_response_id": NEVER, "context_management": NEVER,
    }),
    ("Send its fields at the top level of the body.", {
        "extra_body": EMPTY, "options": EMPTY, "parameters": EMPTY, "sampling_params": EMPTY,
        "generation_config": EMPTY, "generation_kwargs": EMPTY, "sampling_parameters": EMPTY,
    }),
    ("Reasoning, search and other services around the model are not supported.", {
        "prediction": NEVER, "reasoning_effort": ("none",), "reasoning": EMPTY, "thinking": NO_THINKING, "think": OFF,
        "enable_thinking": OFF, "reasoning_budget": (0, -1), "thinking_budget": OFF, "thinking_forced_open": OFF,
        "verbosity": ("medium",), "safe_prompt": OFF, "safe_mode": OFF, "prompt_mode": NEVER, "guardrails": EMPTY,
        "moderation": NEVER, "plugins": EMPTY, "search_parameters": NEVER, "web_search": OFF,
        "web_search_options": NEVER, "citations": OFF, "connectors": EMPTY, "background": OFF, "audio": NEVER,
        "modalities": (["text"], []), "voice": NEVER,
    }),
    ("Describe tools in a message.", {
        "tools": EMPTY, "tool_choice": ("none", "auto"), "functions": EMPTY, "function_call": ("none", "auto"),
        "max_tool_calls": NEVER, "tool_resources": EMPTY, "tools_config": EMPTY,
    }),
)  # fmt: skip
# Fields without effect on the output: bookkeeping, scheduling, caching, and parameters of fields rejected above.
HARMLESS = frozenset((
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "priority", "cache_salt", "cache_prompt", "id_slot", "n_keep", "n_discard",
    "keep_alive", "stream_interval", "kv_transfer_params", "rid", "bootstrap_host", "bootstrap_port", "bootstrap_room",
    "include_reasoning", "separate_reasoning", "stream_reasoning", "reasoning_format", "reasoning_in_content",
    "mirostat_tau", "mirostat_eta", "xtc_threshold", "dynatemp_exponent", "dynatemp_low", "dynatemp_high",
    "smoothing_curve", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "adaptive_decay", "n_cache_reuse", "min_keep", "low_vram", "num_thread", "num_gpu", "main_gpu", "use_mmap",
    "use_mlock", "numa", "num_batch", "provider", "route", "lora_int_id", "pinned", "name", "session_id", "trace",
    "guided_decoding_disable_fallback", "guided_decoding_disable_any_whitespace", "disable_log_stats",
))  # fmt: skip
# Fields of a message that its schema does not have.
MESSAGE_FIELDS: tuple[Row, ...] = (
    ("Tools are not supported. Describe calls and results in the text of a message.", {
        "tool_calls": EMPTY, "tool_call_id": ("",), "function_call": NEVER, "tool_plan": ("",), "tool_name": ("",),
    }),
    ("A message cannot be continued; the output is a new one.", {"prefix": OFF, "partial": OFF, "prefill": OFF}),
    ("Only `content` of a message is used.", {
        "reasoning_content": ("",), "reasoning": ("",), "reasoning_details": EMPTY, "thinking": ("",),
        "thinking_blocks": EMPTY, "refusal": ("",), "images": EMPTY, "audio": NEVER, "videos": EMPTY, "files": EMPTY,
        "attachments": EMPTY, "parts": EMPTY, "mask": NEVER, "task": NEVER, "latest_reminder": NEVER,
    }),
)  # fmt: skip
MESSAGE_HARMLESS = frozenset((
    "name", "annotations", "cache_control", "id", "index", "status", "type", "weight", "created", "timestamp",
    "citations", "prompt_cache_breakpoint",
))  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """Rules for the unknown fields of one request model.

    `rejected` maps a field to its neutral values and the message. If `closed` is not empty, it is the message for every
    field that is not harmless. `normalized` maps normalized names (see `_normalized`) to fields, to detect typos.
    """

    rejected: Mapping[str, tuple[tuple[object, ...], str]]
    harmless: frozenset[str]
    closed: str = ""
    normalized: Mapping[str, str] = field(default_factory=dict)


def _normalized(name: str) -> str:
    """A name in lower case without separators, so that maxTokens equals max_tokens; short names unchanged."""
    cleaned = re.sub(r"[_.\s-]", "", name[:MAX_NAME_LENGTH]).lower()
    return cleaned if len(cleaned) > 3 else name[:MAX_NAME_LENGTH]


def _rules(
    rows: tuple[Row, ...], model: type[BaseModel], harmless: frozenset[str], *, others: tuple[type[BaseModel], ...] = ()
) -> Rules:
    """Rules from `rows` and from the fields of the models `others`, without the fields that `model` has."""
    rejected = {name: (neutral, reason) for reason, names in rows for name, neutral in names.items()}
    for other in others:
        for name in other.model_fields.keys() - PROMPTS - harmless:
            rejected.setdefault(name, (NEUTRAL_VALUES.get(name, NEVER), "This route does not support it."))
    own_fields = model.model_fields
    normalized = {_normalized(name): name for name in [*rejected, *own_fields]}
    return Rules(
        {name: row for name, row in rejected.items() if name not in own_fields},
        harmless - own_fields.keys(),
        normalized=normalized,
    )


_GENERATION = (CompletionRequest, ChatRequest)
RULES: Mapping[type[BaseModel], Rules] = {
    CompletionRequest: _rules(
        (("This is a field of /v1/chat/completions.", {
            "top_logprobs": OFF, "max_completion_tokens": NEVER,
        }), *EVERY_ROUTE),
        CompletionRequest, HARMLESS,
    ),
    ChatRequest: _rules(
        (*EVERY_ROUTE, ("The response does not contain the prompt.", {"echo": OFF})),
        ChatRequest, HARMLESS,
    ),
    ArticleRequest: _rules(EVERY_ROUTE, ArticleRequest, HARMLESS | {"model"}, others=_GENERATION),
    TokenizeText: _rules(
        (*EVERY_ROUTE, ("Send the text as `prompt`.", {"content": NEVER}),
         ("The response has only the token ids.", {"return_token_strs": OFF, "with_pieces": OFF})),
        TokenizeText, HARMLESS,
    ),
    TokenizeChat: _rules(
        (*EVERY_ROUTE, ("Send the text as `prompt`.", {"content": NEVER}),
         ("The response has only the token ids.", {"return_token_strs": OFF, "with_pieces": OFF})),
        TokenizeChat, HARMLESS,
    ),
    Detokenize: _rules((("The response has only the text.", {"skip_special_tokens": OFF}),), Detokenize, HARMLESS),
    LoadAdapter: _rules(
        (("An adapter is served with the configuration it was trained with.", {
            "scale": ONE, "scaling": ONE, "weight": ONE, "alpha": NEVER, "rank": NEVER, "lora_alpha": NEVER,
            "is_3d_lora_weight": OFF, "added_tokens_config": NEVER,
         }),
         ("Adapters are loaded on the served base model.", {
            "base_model_name": NEVER, "base_model": NEVER, "model": NEVER,
         }),
         ("Adapters are read from folders in --adapters-from.", {
            "load_format": NEVER, "lora_local_path": NEVER, "revision": NEVER, "tensors": NEVER, "config_dict": NEVER,
         })),
        LoadAdapter, HARMLESS,
    ),
    UnloadAdapter: _rules((), UnloadAdapter, HARMLESS),
    StreamOptions: _rules(
        (("Token counts are sent at the end only.", {"continuous_usage_stats": OFF, "chunk_include_usage": OFF}),),
        StreamOptions, frozenset(("include_obfuscation",)),
    ),
    ChatMessage: _rules(MESSAGE_FIELDS, ChatMessage, MESSAGE_HARMLESS),
    TextPart: Rules(
        dict.fromkeys(("image_url", "input_audio", "file", "video_url"), (NEVER, "This model supports text only.")),
        MESSAGE_HARMLESS,
    ),
    PlainText: Rules({}, frozenset(), closed="The output is free text."),
}  # fmt: skip


@dataclass
class UnknownFieldLog:
    """Logs each unknown field name once, up to MAX_LOGGED names."""

    _logged: set[str] = field(default_factory=set)

    def note(self, name: str, route: str) -> None:
        cleaned = re.sub(r"[^ -~]", "?", name[:MAX_NAME_LENGTH])
        if cleaned in self._logged or len(self._logged) >= MAX_LOGGED:
            return
        self._logged.add(cleaned)
        LOG.warning("the unknown field %r of a request to %s was ignored", cleaned, route)
        if len(self._logged) == MAX_LOGGED:
            LOG.warning("further unknown fields are not logged")


def check_fields(body: BaseModel, unknown: UnknownFieldLog, *, route: str) -> None:
    """400 for an unsupported field, at any depth, that would change the output."""
    for top_field, path, obj in _objects(body, "", ""):
        rules = RULES[type(obj)]
        if len(obj.model_extra or ()) > MAX_UNKNOWN:
            raise bad_request(
                f"`{path or 'body'}` has more than {MAX_UNKNOWN} unknown fields.", param=top_field or None
            )
        for name, value in (obj.model_extra or {}).items():
            param, full_name = top_field or name, f"{path}.{name}" if path else name
            if name in rules.rejected:
                neutral, reason = rules.rejected[name]
                if not _is_neutral(value, neutral):
                    raise _unsupported(full_name, reason, param=param)
            elif rules.closed and value is not None:
                raise _unsupported(full_name, rules.closed, param=param)
            elif name not in rules.harmless and not name.startswith("speculative."):
                if name.startswith("guided_"):
                    if value is None:
                        continue
                    raise _unsupported(full_name, "The output is free text.", param=param)
                if suggestion := rules.normalized.get(_normalized(name)):
                    message = f"`{_truncated(full_name)}` is unknown. Did you mean `{suggestion}`?"
                    raise bad_request(message, param=_truncated(param), code="unknown_parameter")
                unknown.note(name, route)


def describe_fields(components: dict[str, Any]) -> None:
    """Adds the rejected fields to the OpenAPI schemas of requests, each with its neutral values."""
    for model, rules in RULES.items():
        if (schema := components.get(model.__name__)) is None:
            continue
        rejected = {
            name: {"enum": [None, *neutral], "description": reason, REJECTED_MARK: True}
            for name, (neutral, reason) in rules.rejected.items()
        }
        schema["properties"] = {**schema["properties"], **rejected}
        if rules.closed:
            schema["additionalProperties"] = {"type": "null"}
        else:
            schema["patternProperties"] = {"^guided_": {"enum": [None]}}


def _objects(obj: BaseModel, top_field: str, path: str) -> Iterator[tuple[str, str, BaseModel]]:
    """Yields (top-level field, path, object) for `obj` and all objects in it."""
    yield top_field, path, obj
    for name in type(obj).model_fields:
        value = getattr(obj, name)
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if not isinstance(item, BaseModel):
                break  # the items of a list have one type
            child = f"{path}.{name}" if path else name
            yield from _objects(item, top_field or name, f"{child}[{number}]" if items is value else child)


def _is_neutral(value: Any, neutral: tuple[object, ...]) -> bool:
    return value is None or any(
        value == neutral_value and (isinstance(value, bool) == isinstance(neutral_value, bool) or neutral == OFF)
        for neutral_value in neutral
    )


def _truncated(name: str) -> str:
    return name[:MAX_NAME_LENGTH]


def _unsupported(full_name: str, reason: str, *, param: str) -> ApiError:
    message = f"`{_truncated(full_name)}` is not supported. {reason}"
    return bad_request(message, param=_truncated(param), code="unsupported_parameter")
