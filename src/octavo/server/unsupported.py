"""Request fields that octavo does not have: which are refused, which are harmless, and what is unknown to everybody.

OpenAI, vLLM, SGLang, TGI, llama.cpp, Ollama, text-generation-webui, Mistral, OpenRouter and others have some 200 fields
more than octavo. One that would change the answer is a 400 that names it, unless its value is the one that changes
nothing; one that changes nothing is taken. A name in neither table is ignored, and named once in the log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from octavo.server.errors import ApiError, wrong
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

REFUSED_MARK = "x-refused"  # marks a field that is refused in the OpenAPI schema
LOG = logging.getLogger("octavo.server")
MOST_NAMED = 64  # unknown names in the log: a client that makes names up fills neither log nor memory
LONGEST_NAMED = 60
MOST_OTHERS = 256  # fields of one object that its schema does not have: each is looked at

OFF = (False, 0)
EMPTY: tuple[object, ...] = ([], {}, "")
ONE = (1,)
NEVER: tuple[object, ...] = ()  # null alone
NO_THOUGHT = (False, 0, {"type": "disabled"})
# What is continued, by route: one beside a route's own is unknown there, and no parameter.
PROMPTS = frozenset(("prompt", "messages", "input"))
# Fields that other routes have: the values that change nothing on one that lacks them.
ELSEWHERE: Mapping[str, tuple[object, ...]] = {
    "stream": OFF, "stream_options": EMPTY, "n": ONE, "echo": OFF, "top_p": ONE, "top_k": (*OFF, -1),
    "logprobs": (False,), "repetition_penalty": ONE, "stop": EMPTY, "top_logprobs": OFF,
}  # fmt: skip

Row = tuple[str, dict[str, tuple[object, ...]]]
# Why, then the names, each with the values beside null that change nothing.
ANYWHERE: tuple[Row, ...] = (
    ("Answers are free text.", {
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
    ("Use `stop`, a text.", {
        "stop_token_ids": EMPTY, "stop_sequences": EMPTY, "stop_strings": EMPTY, "stop_words": EMPTY,
        "stop_regex": EMPTY, "stop_token": EMPTY, "stop_tokens": EMPTY, "custom_stopping_strings": EMPTY,
        "stopping_strings": EMPTY,
        "include_stop_str_in_output": OFF, "no_stop_trim": OFF,
    }),
    ("An answer ends with the model's end token; `max_tokens` bounds it.", {
        "ignore_eos": OFF, "ban_eos_token": OFF, "min_tokens": OFF, "min_new_tokens": OFF, "min_length": OFF,
        "n_indent": OFF, "t_max_predict_ms": (0, -1), "max_time": NEVER, "exponential_decay_length_penalty": NEVER,
        "forced_bos_token_id": NEVER, "forced_eos_token_id": NEVER, "thinking_token_budget": NEVER,
    }),
    ("Tokens can be neither banned nor forced.", {
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
    ("Set `temperature` to 0 for a greedy answer.", {"do_sample": (True,), "greedy": OFF}),
    ("There is no beam search; ask for `n` answers.", {
        "use_beam_search": OFF, "num_beams": ONE, "beam_width": ONE, "num_beam_groups": ONE, "diversity_penalty": OFF,
        "length_penalty": ONE, "early_stopping": OFF, "best_of": ONE, "num_return_sequences": ONE,
    }),
    ("Use `seed`.", {"random_seed": NEVER}),
    ("Use `logprobs`; a prompt's are had with `echo` on /v1/completions.", {
        "prompt_logprobs": (False,), "n_probs": OFF, "decoder_input_details": OFF, "details": OFF,
        "top_n_tokens": OFF, "return_logprob": OFF, "logprob_start_len": (-1,), "top_logprobs_num": OFF,
        "token_ids_logprob": EMPTY, "logprob_token_ids": EMPTY, "post_sampling_probs": OFF,
        "logprobs_mode": ("raw_logprobs",),
    }),
    ("The answer has OpenAI's fields alone.", {
        "return_token_ids": OFF, "return_tokens": OFF, "return_tokens_as_token_ids": OFF, "return_full_text": OFF,
        "return_hidden_states": OFF, "return_text_in_logprobs": OFF, "response_fields": EMPTY, "timings_per_token": OFF,
        "return_progress": OFF, "verbose": OFF, "skip_special_tokens": (True,), "detokenize": (True,),
        "spaces_between_special_tokens": (True,), "clean_up_tokenization_spaces": OFF,
    }),
    ("Prompts are encoded as /tokenize does, and never cut.", {
        "truncate_prompt_tokens": NEVER, "truncate": NEVER, "truncation": ("disabled", False), "truncation_side": NEVER,
        "add_special_tokens": (True,), "add_bos_token": (True,), "add_special": (True,), "parse_special": OFF,
        "prefix_token_id": NEVER, "auto_max_new_tokens": OFF, "prompt_lookup_num_tokens": OFF, "transforms": EMPTY,
        "num_ctx": NEVER, "max_context_length": NEVER, "rope_freq_base": NEVER, "rope_freq_scale": NEVER,
    }),
    ("Choose an adapter by its name in `model`.", {
        "lora": EMPTY, "lora_request": NEVER, "lora_path": NEVER, "lora_name": NEVER, "lora_id": NEVER,
        "adapter": NEVER, "adapters": EMPTY, "adapter_id": NEVER, "adapter_source": NEVER, "adapter_parameters": EMPTY,
        "models": EMPTY, "base_model": NEVER,
    }),
    ("The conversation goes through the model's own chat template, up to the assistant's next turn.", {
        "chat_template": NEVER, "chat_template_kwargs": EMPTY, "continue_final_message": OFF,
        "add_generation_prompt": (True,), "template": NEVER, "instruction_template": NEVER,
        "instruction_template_str": NEVER, "chat_template_str": NEVER, "character": NEVER, "mode": NEVER, "raw": OFF,
        "continue_": OFF, "context": NEVER, "bot_name": NEVER, "user_name": NEVER, "tool_prompt": NEVER,
        "chat_format": NEVER, "jinja": NEVER,
    }),
    ("The prompt is text or token ids, given in `prompt` or `messages`.", {
        "documents": EMPTY, "prompt_embeds": EMPTY, "input_embeds": EMPTY, "input_ids": EMPTY, "inputs": NEVER,
        "text": NEVER, "system": ("",), "system_prompt": ("",), "instructions": ("",), "images": EMPTY,
        "image_data": EMPTY, "audio_data": EMPTY, "video_data": EMPTY, "multi_modal_data": EMPTY,
        "multimodal_data": EMPTY, "mm_processor_kwargs": EMPTY, "media_io_kwargs": EMPTY, "input_prefix": ("",),
        "input_suffix": ("",), "input_extra": EMPTY, "suffix": ("",), "memory": ("",), "file_ids": EMPTY,
        "conversation": NEVER, "previous_response_id": NEVER, "context_management": NEVER,
    }),
    ("Send its fields at the top of the body.", {
        "extra_body": EMPTY, "options": EMPTY, "parameters": EMPTY, "sampling_params": EMPTY,
        "generation_config": EMPTY, "generation_kwargs": EMPTY, "sampling_parameters": EMPTY,
    }),
    ("The model answers at once, by itself.", {
        "prediction": NEVER, "reasoning_effort": ("none",), "reasoning": EMPTY, "thinking": NO_THOUGHT, "think": OFF,
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
# Known, and without effect on the answer: bookkeeping, scheduling, caching, and what only tunes a field refused above.
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
# What of a field's own object there may be beside what its schema has.
MESSAGE: tuple[Row, ...] = (
    ("Tools are not supported: describe calls and results in a message's text.", {
        "tool_calls": EMPTY, "tool_call_id": ("",), "function_call": NEVER, "tool_plan": ("",), "tool_name": ("",),
    }),
    ("An answer always begins anew, after the last message.", {"prefix": OFF, "partial": OFF, "prefill": OFF}),
    ("A message is its `content` alone.", {
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
    """What one kind of object may hold beside its schema's fields. `closed`: refuse every other name too.

    `spelt`: by what is left of them without case and separators, the fields whose misspellings are refused.
    """

    refused: Mapping[str, tuple[tuple[object, ...], str]]
    harmless: frozenset[str]
    closed: str = ""
    spelt: Mapping[str, str] = field(default_factory=dict)


def _plain(name: str) -> str:
    """A name without case and separators, as maxTokens and max_tokens have it in common; short ones as they are."""
    plain = re.sub(r"[_.\s-]", "", name[:LONGEST_NAMED]).lower()
    return plain if len(plain) > 3 else name[:LONGEST_NAMED]


def _rules(
    rows: tuple[Row, ...], model: type[BaseModel], harmless: frozenset[str], *, others: tuple[type[BaseModel], ...] = ()
) -> Rules:
    """The rows but for what `model` has; and the fields of `others`, which this one does not have."""
    refused = {name: (neutral, why) for why, names in rows for name, neutral in names.items()}
    for other in others:
        for name in other.model_fields.keys() - PROMPTS - harmless:
            refused.setdefault(name, (ELSEWHERE.get(name, NEVER), "This route does not have it."))
    own = model.model_fields
    spelt = {_plain(name): name for name in [*refused, *own]}
    return Rules({name: row for name, row in refused.items() if name not in own}, harmless - own.keys(), spelt=spelt)


_GENERATION = (CompletionRequest, ChatRequest)
RULES: Mapping[type[BaseModel], Rules] = {
    CompletionRequest: _rules(
        (("This is a field of conversations: ask /v1/chat/completions.", {
            "top_logprobs": OFF, "max_completion_tokens": NEVER,
        }), *ANYWHERE),
        CompletionRequest, HARMLESS,
    ),
    ChatRequest: _rules(
        (*ANYWHERE, ("The answer alone is given.", {"echo": OFF})),
        ChatRequest, HARMLESS,
    ),
    ArticleRequest: _rules(ANYWHERE, ArticleRequest, HARMLESS | {"model"}, others=_GENERATION),
    TokenizeText: _rules(
        (*ANYWHERE, ("Give the text as `prompt`.", {"content": NEVER}),
         ("The answer has the ids alone.", {"return_token_strs": OFF, "with_pieces": OFF})),
        TokenizeText, HARMLESS,
    ),
    TokenizeChat: _rules(
        (*ANYWHERE, ("Give the text as `prompt`.", {"content": NEVER}),
         ("The answer has the ids alone.", {"return_token_strs": OFF, "with_pieces": OFF})),
        TokenizeChat, HARMLESS,
    ),
    Detokenize: _rules((("The answer has the text alone.", {"skip_special_tokens": OFF}),), Detokenize, HARMLESS),
    LoadAdapter: _rules(
        (("An adapter is served as it was trained.", {
            "scale": ONE, "scaling": ONE, "weight": ONE, "alpha": NEVER, "rank": NEVER, "lora_alpha": NEVER,
            "is_3d_lora_weight": OFF, "added_tokens_config": NEVER,
         }),
         ("It is loaded on the one base that is served.", {
            "base_model_name": NEVER, "base_model": NEVER, "model": NEVER,
         }),
         ("Adapters are read from folders below --adapters-from.", {
            "load_format": NEVER, "lora_local_path": NEVER, "revision": NEVER, "tensors": NEVER, "config_dict": NEVER,
         })),
        LoadAdapter, HARMLESS,
    ),
    UnloadAdapter: _rules((), UnloadAdapter, HARMLESS),
    StreamOptions: _rules(
        (("A stream has its counts at the end alone.", {"continuous_usage_stats": OFF, "chunk_include_usage": OFF}),),
        StreamOptions, frozenset(("include_obfuscation",)),
    ),
    ChatMessage: _rules(MESSAGE, ChatMessage, MESSAGE_HARMLESS),
    TextPart: Rules(
        dict.fromkeys(("image_url", "input_audio", "file", "video_url"), (NEVER, "This model reads text alone.")),
        MESSAGE_HARMLESS,
    ),
    PlainText: Rules({}, frozenset(), closed="Answers are free text."),
}  # fmt: skip


@dataclass
class UnknownNames:
    """Names of fields that no table has: each is written to the log once, and only so many of them."""

    _named: set[str] = field(default_factory=set)

    def note(self, name: str, where: str) -> None:
        plain = re.sub(r"[^ -~]", "?", name[:LONGEST_NAMED])
        if plain in self._named or len(self._named) >= MOST_NAMED:
            return
        self._named.add(plain)
        LOG.warning("the unknown field %r of a request to %s was ignored", plain, where)
        if len(self._named) == MOST_NAMED:
            LOG.warning("further unknown fields are not named")


def check_fields(asked: BaseModel, unknown: UnknownNames, *, where: str) -> None:
    """400 for a field, at any depth, that would change the answer and is not supported."""
    for top, path, found in _objects(asked, "", ""):
        rules = RULES[type(found)]
        if len(found.model_extra or ()) > MOST_OTHERS:
            raise wrong(f"`{path or 'body'}` has more than {MOST_OTHERS} unknown fields.", param=top or None)
        for name, value in (found.model_extra or {}).items():
            param, shown = top or name, f"{path}.{name}" if path else name
            if name in rules.refused:
                neutral, why = rules.refused[name]
                if not _is_neutral(value, neutral):
                    raise _unsupported(shown, why, param=param)
            elif rules.closed and value is not None:
                raise _unsupported(shown, rules.closed, param=param)
            elif name not in rules.harmless and not name.startswith("speculative."):
                if name.startswith("guided_"):
                    if value is None:
                        continue
                    raise _unsupported(shown, "Answers are free text.", param=param)
                if meant := rules.spelt.get(_plain(name)):
                    message = f"`{_cut(shown)}` is not known here. Is `{meant}` meant?"
                    raise wrong(message, param=_cut(param), code="unknown_parameter")
                unknown.note(name, where)


def describe_fields(components: dict[str, Any]) -> None:
    """Adds to the OpenAPI schemas of requests the fields that are refused, each with the values that are not."""
    for model, rules in RULES.items():
        if (schema := components.get(model.__name__)) is None:
            continue
        refused = {
            name: {"enum": [None, *neutral], "description": why, REFUSED_MARK: True}
            for name, (neutral, why) in rules.refused.items()
        }
        schema["properties"] = {**schema["properties"], **refused}
        if rules.closed:
            schema["additionalProperties"] = {"type": "null"}
        else:
            schema["patternProperties"] = {"^guided_": {"enum": [None]}}


def _objects(found: BaseModel, top: str, path: str) -> Iterator[tuple[str, str, BaseModel]]:
    """(the top field, the way there, the object) for `found` and all objects within it."""
    yield top, path, found
    for name in type(found).model_fields:
        value = getattr(found, name)
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if not isinstance(item, BaseModel):
                break  # a list is of one kind
            own = f"{path}.{name}" if path else name
            yield from _objects(item, top or name, f"{own}[{number}]" if items is value else own)


def _is_neutral(value: Any, neutral: tuple[object, ...]) -> bool:
    return value is None or any(
        value == each and (isinstance(value, bool) == isinstance(each, bool) or neutral == OFF) for each in neutral
    )


def _cut(name: str) -> str:
    return name[:LONGEST_NAMED]


def _unsupported(shown: str, why: str, *, param: str) -> ApiError:
    return wrong(f"`{_cut(shown)}` is not supported here. {why}", param=_cut(param), code="unsupported_parameter")
