"""Model folders for the tests of the store: tiny random ones with a tokenizer, and the real SmolLM2."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.full_adapters import CASES, Written, write_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from octavo.store.builtin import open_smollm2
from octavo.store.sources import FolderSource

# K = 64 keeps whole NF4 blocks; of the weights, some fill dynamic8's blocks of 4096 and some do not.
LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "pad_token_id": None}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
    "smollm3": SmolLM3Config(**LLAMA, no_rope_layers=[0, 1], pad_token_id=None),
    "olmo2": Olmo2Config(**LLAMA, pad_token_id=None),
    "gemma2": Gemma2Config(**LLAMA, **GEMMA),
    "gemma3": Gemma3TextConfig(**LLAMA, **GEMMA, sliding_window_pattern=2),
    "neox": GPTNeoXConfig(**NEOX),
    "neox-tied": GPTNeoXConfig(**NEOX, tie_word_embeddings=True),
    # The rows of q, k and v of a head are four whole blocks of dynamic8, and one block of scales of nf4-double.
    "neox-blocks": GPTNeoXConfig(**NEOX | {"hidden_size": 256, "num_attention_heads": 4}),
    "gpt2": GPT2Config(
        vocab_size=300, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    ),
    "gpt_neo": GPTNeoConfig(
        vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    ),
    "gptj": GPTJConfig(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of CONFIGS, as transformers writes it, float32. Not to be changed."""
    parent = tmp_path_factory.mktemp("models")
    return {name: write_model(parent / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def families(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of `folders`, one in which only q, k and v have biases, and one of a tied head with a bias."""
    models = tmp_path_factory.mktemp("models")
    qwen2 = write_model(models / "qwen2", Qwen2Config(**LLAMA, tie_word_embeddings=True))
    gptj = GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, tie_word_embeddings=True)
    return {**folders, "qwen2": qwen2, "gptj-tied": write_model(models / "gptj-tied", gptj)}


@pytest.fixture(scope="session")
def written(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Writes PEFT's adapter of a case, once: (its folder, not to be changed; the logits of PEFT's model)."""

    @cache
    def write(case: str) -> tuple[Path, Tensor]:
        out = tmp_path_factory.mktemp("adapter")
        return out, write_adapter(case, families[CASES[case][0]], out)

    return write


@pytest.fixture
def llama_folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the folder of a Llama, which a test may change or damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


@pytest.fixture(scope="session")
def smollm2(smollm2_cache: Path) -> FolderSource:
    """The real small model, converted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(smollm2_cache))
        return open_smollm2()


def write_model(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one merge."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0], bos_token=tokens[0])
