"""Unsloth as a peer: its FastLanguageModel on the weights of shapes.py, with the defaults of its documentation.

`build(method, model, ...)` returns a `Trainable`, as in peers.py. Unsloth loads from a folder, so the random weights
are first written to a temporary checkpoint. The settings are those of Unsloth's trainer: training mode, its
checkpointing with offload of the blocks' inputs to CPU memory, adapters in float32 under bfloat16 autocast, its fused
linear and cross-entropy loss (without logits), AdamW8bit.

Unsloth patches transformers, PEFT and TRL at its import and must be imported before them: `build` does, and measure.py
imports none of them earlier. Importing this module imports torch only.
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

METHODS = ("unsloth-bf16", "unsloth-nf4")
MODELS = ("llama", "llama-128k", "qwen3", "qwen3-8b")
MAX_SEQ_LEN = 2048  # Unsloth truncates longer rows without an error
CHECKPOINTING = "unsloth"  # offloads the inputs of the blocks to page-locked CPU memory
SHARD_BYTES = 2**30
# No network access; generated code goes to a temporary folder; the loss is the fused one.
ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_RETURN_LOGITS": "0",
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
}


def scheme_of(method: str) -> str:
    """The scheme of the frozen weights: bf16 or nf4. KeyError if `method` is not in METHODS."""
    if method not in METHODS:
        raise KeyError(method)
    return method.removeprefix("unsloth-")


def versions() -> str:
    """Unsloth's versions for the note of a row; PackageNotFoundError if it is not installed."""
    return f"unsloth {version('unsloth')}, unsloth_zoo {version('unsloth_zoo')}, trl {version('trl')}"


def build(
    method: str, model_name: str, *, seed: int, device: torch.device | str, tiny: bool = False
) -> peers.Trainable:
    """A method of METHODS on random weights, ready for its first step. Rows have at most MAX_SEQ_LEN tokens."""
    scheme = scheme_of(method)
    if model_name not in MODELS:
        raise ValueError(f"{method} is measured on {', '.join(MODELS)}: Unsloth has no fast kernels for {model_name}")
    device = torch.device(device)
    fast = _unsloth()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        write_checkpoint(folder, model_name, seed=seed, device=device, tiny=tiny)
        model, _ = fast.from_pretrained(
            str(folder), max_seq_length=MAX_SEQ_LEN, dtype=torch.bfloat16, load_in_4bit=scheme == "nf4",
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
    """Unsloth's loader of language models. A process must not import transformers before."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import unsloth

    return unsloth.FastLanguageModel


def _restore_embedding_(model: Any, *, device: torch.device, seed: int) -> None:
    """Restores the padding token's row, which Unsloth zeroes: the random ids contain every token."""
    embedding: nn.Parameter = model.get_input_embeddings().weight
    values = weight("model.embed_tokens.weight", tuple(embedding.shape), device, embedding.dtype, seed=seed)
    embedding.data.copy_(values)


def _set_adapters_(tuned: nn.Module, *, device: torch.device, seed: int) -> dict[str, tuple[nn.Parameter, float]]:
    """Sets A and B to the values of `lora` and returns them by PEFT's names. Nothing else may be trained."""
    adapters = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            peft_name = name.replace(".default", "")
            assert ".lora_A." in peft_name or ".lora_B." in peft_name, f"{name} is trained too"
            values = lora(peft_name, tuple(parameter.shape), device, parameter.dtype, seed=seed)
            parameter.data.copy_(values)
            adapters[peft_name] = (parameter, 1.0)
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
    """Writes a tokenizer with one token per row of the embedding: Unsloth compares the sizes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<2>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<0>", "eos_token": "<0>", "pad_token": "<1>", "unk_token": "<2>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_SEQ_LEN, **special)
    tokenizer.save_pretrained(folder)


def _shards(model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of the checkpoint on the CPU in shards of about SHARD_BYTES; `device` draws each."""
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
    return sum(tensor.nbytes for tensor in tensors.values())
