"""Unsloth as a peer: its FastLanguageModel on the weights of shapes.py, with the defaults of its documentation.

`build(way, model, ...)` gives a `Trainable`, as in peers.py. Unsloth loads from a folder, so the random weights are
first written as a checkpoint, which is removed once they are loaded. What is set here is what its trainer sets: the
model in training mode, its checkpointing that keeps the inputs of the blocks in the host's memory, adapters in float32
under bfloat16 autocast, its fused linear and cross-entropy loss (it answers without logits), AdamW8bit.

Unsloth replaces parts of transformers, PEFT and TRL as it is imported, so it comes before them: `build` imports it
first, and measure.py imports nothing of them ahead of it. Importing this loads torch only.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peers
from shapes import ALPHA, LINEARS, RANK, lora, shapes, weight

WAYS = ("unsloth-bf16", "unsloth-nf4")
LONGEST = 2048  # Unsloth cuts longer rows off without an error
CHECKPOINTING = "unsloth"  # the inputs of the blocks wait in page-locked host memory
SHARD_BYTES = 2**30
# Nothing is sent or fetched; what Unsloth generates goes where it may lie; the loss is the fused one.
SURROUNDINGS = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_RETURN_LOGITS": "0",
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
}


def scheme_of(way: str) -> str:
    """How a way holds its frozen weights: bf16 or nf4. KeyError if it is none of WAYS."""
    if way not in WAYS:
        raise KeyError(way)
    return way.removeprefix("unsloth-")


def versions() -> str:
    """Unsloth's releases, for the note of a row; PackageNotFoundError where it is not installed."""
    return f"unsloth {version('unsloth')}, unsloth_zoo {version('unsloth_zoo')}, trl {version('trl')}"


def build(way: str, model_name: str, *, seed: int, device: torch.device | str, tiny: bool = False) -> peers.Trainable:
    """A way of WAYS on random weights, ready for its first step. Rows may have at most LONGEST tokens."""
    scheme = scheme_of(way)
    if model_name != "llama":
        raise ValueError(f"{way} is measured on llama: Unsloth has no fast path for {model_name}")
    device = torch.device(device)
    fast = _unsloth()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        write_checkpoint(folder, model_name, seed=seed, device=device, tiny=tiny)
        model, _ = fast.from_pretrained(
            str(folder), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=scheme == "nf4",
            use_gradient_checkpointing=CHECKPOINTING,
        )  # fmt: skip
    _restore_embedding_(model, device=device, seed=seed)
    tuned = fast.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=list(LINEARS[model_name]),
        use_gradient_checkpointing=CHECKPOINTING,
    )  # fmt: skip
    fast.for_training(tuned)
    adapters = _set_adapters_(tuned, device=device, seed=seed)
    optimizer = peers._optimizer("AdamW8bit", adapters, peers.LEARNING_RATE)
    return peers.Peer(tuned, optimizer, adapters, torch.bfloat16, device)


def _unsloth() -> Any:
    """Unsloth's loader of language models. In a process this comes before anything that imports transformers."""
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    import unsloth

    return unsloth.FastLanguageModel


def _restore_embedding_(model: nn.Module, *, device: torch.device, seed: int) -> None:
    """Unsloth zeroes the padding token's row; here every row is a token of the text, as the other ways have it."""
    table: nn.Parameter = model.get_input_embeddings().weight
    values = weight("model.embed_tokens.weight", tuple(table.shape), device, table.dtype, seed=seed)
    table.data.copy_(values)


def _set_adapters_(tuned: nn.Module, *, device: torch.device, seed: int) -> dict[str, tuple[nn.Parameter, float]]:
    """Gives A and B the values of `lora`, and returns them by PEFT's names. Nothing else may be trained."""
    adapters = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            known = name.replace(".default", "")
            assert ".lora_A." in known or ".lora_B." in known, f"{name} is trained too"
            drawn = lora(known, tuple(parameter.shape), device, parameter.dtype, seed=seed)
            parameter.data.copy_(drawn)
            adapters[known] = (parameter, 1.0)
    return adapters


# The checkpoint that Unsloth loads.


def write_checkpoint(folder: Path, model_name: str, *, seed: int, device: torch.device | str, tiny: bool) -> None:
    """Config, tokenizer and bfloat16 weights of `shapes`, as transformers reads them, in files of about 1 GiB."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    settings = shapes(model_name, tiny=tiny)
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}), "utf-8")
    write_tokenizer(folder, settings["vocab_size"])
    weight_entries: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(model_name, seed=seed, device=torch.device(device), tiny=tiny)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_entries.update(dict.fromkeys(tensors, file))
        total += _bytes(tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word for every row of the embedding: nothing is tokenised, but Unsloth loads a tokenizer and counts it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<2>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<0>", "eos_token": "<0>", "pad_token": "<1>", "unk_token": "<2>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LONGEST, **special)
    tokenizer.save_pretrained(folder)


def _shards(model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Iterator[dict[str, Tensor]]:
    """All tensors of the checkpoint on the CPU, some SHARD_BYTES at a time; one is on `device` while it is drawn."""
    skeleton = peers._empty_model(model_name, tiny=tiny, dtype=torch.bfloat16, attention="sdpa")
    shard: dict[str, Tensor] = {}
    for name, empty in skeleton.named_parameters():
        shard[name] = weight(name, tuple(empty.shape), device, torch.bfloat16, seed=seed).cpu()
        if _bytes(shard) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors.values())
