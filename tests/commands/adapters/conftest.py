"""Two adapters that PEFT wrote, on one base: other ranks, scalings and targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import octavo as api

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
}
Write = Callable[..., Path]


def write_peft(folder: Path, base: Path, *, seed: int, **settings: Any) -> Path:
    """An adapter of PEFT with random values in B, in norms and in biases."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def peft_adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("peft")
    return {
        name: write_peft(folder / name, tiny_llama, seed=number, **settings)
        for number, (name, settings) in enumerate(SETTINGS.items())
    }


@pytest.fixture
def write(tiny_llama: Path, tmp_path: Path) -> Write:
    """Writes an adapter of PEFT: write("c", seed=1, r=2, target_modules=["q_proj"])."""

    def write_one(name: str, *, seed: int, base: Path = tiny_llama, **settings: Any) -> Path:
        return write_peft(tmp_path / name, base, seed=seed, **settings)

    return write_one


@pytest.fixture(scope="session")
def run(tiny_llama: Path, plays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("checkpoints") / "mine"
    api.finetune(
        model=tiny_llama, data=[plays / "train"], test_data=[plays / "test"], out=out, dtype="float32", seq_len=32,
        steps=2, checkpoint_every=1, eval_every=1, rank=2, lr=0.05, sample_tokens=1, keep="last", probes=False,
        quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of one layer, whose weights are stored (K, N), without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny") / "gpt2"
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
