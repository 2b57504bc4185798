"""Fixtures of the inference tests: tiny models on disk, adapters for them, and the answers of infer/generate.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SmolLM3Config,
)

from octavo.adapters import Adapter, AdapterPlan, apply_, create_, save, trained
from octavo.infer.engine import Engine
from octavo.infer.generate import Continuation, complete
from octavo.infer.requests import Limits, Request, Stream, Token
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.quantize import scheme_named
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load

CONTEXT = 48
LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
# The families' own ids of special tokens are beyond the vocabulary here.
NO_IDS: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
# With a tied head and scaled embeddings a random model repeats its last token.
GEMMA: dict[str, Any] = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "tie_word_embeddings": False, **NO_IDS,
}  # fmt: skip
# 64 columns are one block of nf4. The last 6 tokens of the vocabulary are not the tokenizer's: never selected.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(vocab_size=264, **LLAMA, attention_bias=True, tie_word_embeddings=False),
    "tied": LlamaConfig(vocab_size=264, **LLAMA, tie_word_embeddings=True),
    "mistral": MistralConfig(vocab_size=264, **LLAMA, sliding_window=6, tie_word_embeddings=False, **NO_IDS),
    "qwen3": Qwen3Config(vocab_size=264, **LLAMA, head_dim=16),
    "smollm3": SmolLM3Config(vocab_size=264, **LLAMA, no_rope_layers=[1, 0], tie_word_embeddings=False, **NO_IDS),
    "olmo2": Olmo2Config(vocab_size=264, **LLAMA, **NO_IDS),
    "gemma2": Gemma2Config(
        vocab_size=264, **LLAMA, **GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=5.0,
        attn_implementation="eager",
    ),
    "gemma3": Gemma3TextConfig(vocab_size=264, **LLAMA, **GEMMA, sliding_window_pattern=2),
    "neox": GPTNeoXConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "gpt2": GPT2Config(vocab_size=264, n_embd=64, n_inner=64, n_layer=2, n_head=4, n_positions=CONTEXT, **NO_IDS),
    "gpt_neo": GPTNeoConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local", "global"], 1]],
        window_size=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        **NO_IDS,
    ),
    "gptj": GPTJConfig(vocab_size=264, n_embd=64, n_inner=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=CONTEXT),
}  # fmt: skip
EMBEDDINGS = {
    "llama": ("embed_tokens", "lm_head"),
    "mistral": ("embed_tokens", "lm_head"),
    "qwen3": ("embed_tokens", "lm_head"),
    "smollm3": ("embed_tokens", "lm_head"),
    "olmo2": ("embed_tokens", "lm_head"),
    "gemma2": ("embed_tokens", "lm_head"),
    "gemma3": ("embed_tokens", "lm_head"),
    "neox": ("embed_in", "embed_out"),
    "tied": ("embed_tokens",),
    "gpt2": ("wte",),
    "gpt_neo": ("wte", "lm_head"),
    "gptj": ("wte", "lm_head"),
}
SPEC = LoraSpec(rank=4, alpha=12.0)


@pytest.fixture(autouse=True)
def prefill_tiles_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contexts here are shorter than a tile; with tiles of one token chunks and reused prompts end anywhere."""
    monkeypatch.setattr(tiles, "PREFILL_TILE", 1)


@dataclass(repr=False)
class Family:
    """A tiny random model in a folder, float32, with its adapters and the answers of the reference."""

    name: str
    folder: Path
    reference: Any  # transformers' model
    tokenizer: PreTrainedTokenizerFast
    _models: dict[tuple[str | None, str, torch.dtype], Decoder] = field(default_factory=dict)
    _answers: dict[tuple[Request, str, torch.dtype, tuple[int, ...]], Continuation] = field(default_factory=dict)

    def model(self, scheme: str = "none", dtype: torch.dtype = torch.float32) -> Decoder:
        return load(FolderSource(self.folder), scheme_named(scheme), dtype=dtype, device=torch.device("cpu"))

    @cached_property
    def plans(self) -> dict[str, AdapterPlan]:
        return {
            "blocks": AdapterPlan(SPEC),
            "embeddings": AdapterPlan(SPEC, ("all-linear", *EMBEDDINGS[self.name])),
            "norms": AdapterPlan(SPEC, norms=True),
        }

    def adapter(self, kind: str) -> Adapter:
        """The adapter of a plan with random parameters."""
        return read(self.adapter_folder(kind))

    def adapter_folder(self, kind: str) -> Path:
        """The folder of `adapter`."""
        folder = self.folder.parent / f"{self.name}-{kind}"
        if not folder.exists():
            model, plan, seed = self.model(), self.plans[kind], list(self.plans).index(kind)
            create_(model, plan, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            for parameter in trained(model).values():
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
            save(folder, model, plan, base="base", origin={}, readme="")
        return folder

    def engine(self, limits: Limits, model: Decoder | None = None, *, stop_ids: Sequence[int] = ()) -> Engine:
        return Engine(model or self.model(), self.tokenizer, base="base", limits=limits, stop_ids=stop_ids)

    def alone(
        self,
        request: Request,
        scheme: str = "none",
        dtype: torch.dtype = torch.float32,
        stop_ids: tuple[int, ...] = (),
    ) -> Continuation:
        """The answer to a request by infer/generate.py, with the adapter applied to the model by `apply_`."""
        key = request, scheme, dtype, stop_ids
        if key not in self._answers:
            owner = request.adapter, scheme, dtype
            if owner not in self._models:
                self._models[owner] = self.model(scheme, dtype)
                if request.adapter is not None:
                    apply_(self._models[owner], self.adapter(request.adapter))
            model = self._models[owner]
            self._answers[key] = complete(model, self.tokenizer, request.prompt, request.sampling, stop_ids=stop_ids)
        return self._answers[key]

    @staticmethod
    def answer(stream: Stream) -> Continuation:
        """The answer of a finished stream. The mark of an error or a cancellation is no token."""
        tokens: list[Token] = []
        while not tokens or tokens[-1].finish_reason is None:
            tokens.append(stream.next(timeout=0))
        ids = tuple(token.token_id for token in tokens if token.token_id >= 0)
        return Continuation("".join(token.text for token in tokens), ids, str(tokens[-1].finish_reason))

    @staticmethod
    def run_out(engine: Engine) -> None:
        """Takes steps until no request is left."""
        while (stats := engine.stats()).running or stats.waiting:
            assert stats.steps_total < 5000
            engine.step()


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder = tmp_path_factory.mktemp("serving")
    return {name: Family(name, folder / name, *_write_model(folder / name, config)) for name, config in CONFIGS.items()}


@pytest.fixture(params=["llama", "gptj"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


@pytest.fixture
def llama(families: dict[str, Family]) -> Family:
    return families["llama"]


def _write_model(folder: Path, config: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    zero_centred = config.model_type.startswith("gemma")  # norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm and not zero_centred), std=0.2)
    model.save_pretrained(folder)
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0])
