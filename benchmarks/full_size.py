"""Measures conversion and loading of a model of full size: seconds and peak memory of the process.

    python benchmarks/full_size.py write DIR --family gptj       # 12 GB: GPT-J-6B's shapes, random, float16
    python benchmarks/full_size.py convert DIR OUT --scheme int8
    python benchmarks/full_size.py load OUT --device cuda

Each prints one JSON line. `peak_anonymous_bytes` is the maximum of RssAnon in /proc/PID/status, sampled every 20 ms.
It excludes pages of mapped files, which the operating system reclaims on demand; `peak_resident_bytes`, the kernel's
VmHWM, includes them. The random weights depend on the seed only, so `write` always writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02
SHARD_BYTES = 2**30
STD = 0.02  # of the weights, as transformers initializes them; biases have a tenth of it
# Llama-3-8B (arXiv 2407.21783, table 3) with a quarter of its vocabulary. The defaults of GPTJConfig are
# EleutherAI/gpt-j-6B.
LLAMA: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LOAD = """
import json, sys, time
from pathlib import Path
import torch
from octavo.models import build, weight_entries
from octavo.store.sources import FolderSource
from octavo.store.contents import stored_scheme
from octavo.store.weights import load

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

source, device = FolderSource(Path(sys.argv[1])), torch.device(sys.argv[2])
build(source.config)
torch.ones(1, device=device)  # allocates the driver's memory, which is not the loader's
start, began = anonymous(), time.perf_counter()
model = load(source, stored_scheme(source), dtype=torch.bfloat16, device=device)
if device.type == "cuda":
    torch.cuda.synchronize()
seconds = time.perf_counter() - began
matrices = {id(entry.matrix): entry.matrix for entry in weight_entries(model).values() if entry.matrix}
print(json.dumps({
    "scheme": stored_scheme(source).name,
    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    "load_seconds": round(seconds, 2),
    "start_anonymous_bytes": start,
    "end_anonymous_bytes": anonymous(),
    "stored_bytes": sum(matrix.stored_bytes for matrix in matrices.values()),
    "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--family", choices=["gptj", "llama"], default="gptj")
    converting = commands.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("--scheme", default="int8")
    loading = commands.add_parser("load")
    loading.add_argument("folder", type=Path)
    loading.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "write":
        result = write(args.folder, args.family)
    elif args.command == "convert":
        options = ["--model", str(args.folder), "--out", str(args.out), "--scheme", args.scheme, "--json"]
        result = measured([sys.executable, "-m", "octavo", "quantize", *options])
        result["layers"] = len(result["layers"])
    else:
        result = measured([sys.executable, "-c", LOAD, str(args.folder), args.device])
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    sys.stdout.write(json.dumps({"command": args.command, "threads": threads, **result}) + "\n")


def write(folder: Path, family: str) -> dict[str, Any]:
    """Writes a random model in shards; at most one shard and one tensor are in memory."""
    from safetensors.torch import save_file

    began, total = time.perf_counter(), 0
    folder.mkdir(parents=True)
    config = model_config(family)
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shards: list[list[str]] = []
    for shard in in_shards(random_tensors(config.to_dict(), config.dtype)):
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # frees this shard before the generator allocates the next one
    weight_entries = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_entries.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    status = Path("/proc/self/status").read_text()
    return {
        "out": str(folder),
        "bytes": total,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_resident_bytes": _of(status, "VmHWM"),
    }


def model_config(family: str) -> Any:
    """The transformers config of gptj or llama."""
    import torch
    from transformers import GPTJConfig, LlamaConfig

    if family == "gptj":
        return GPTJConfig(architectures=["GPTJForCausalLM"], dtype=torch.float16)
    return LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)


def random_tensors(config: dict[str, Any], dtype: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, tensor) of a checkpoint in order. The seed of a tensor is its index."""
    import torch

    from octavo.models import build
    from octavo.store.contents import items_of

    for seed, (name, item) in enumerate(items_of(build(config))):
        if item.is_matrix:
            assert item.entry.matrix is not None
            shape: tuple[int, ...] = (item.entry.matrix.outputs[item.entry.rows_key], item.entry.matrix.in_features)
        else:
            parameter = item.entry.parameter(item.kind)
            assert parameter is not None
            shape = tuple(parameter.shape)
        tensor = torch.empty(shape, dtype=dtype)
        if item.is_matrix or item.entry.matrix is not None:
            std = STD if item.is_matrix else STD / 10
            tensor.normal_(0, std, generator=torch.Generator().manual_seed(seed))
        else:
            tensor.fill_(float(item.kind == "weight"))  # norms
        yield name, tensor


def in_shards(tensors: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Groups tensors by name in shards of up to SHARD_BYTES."""
    shard: dict[str, Any] = {}
    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def tokenizer() -> Any:
    """A byte-level tokenizer of 257 tokens. The other rows of the embedding are unused, as the last 143 of GPT-J-6B."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0], bos_token=tokens[0])


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a program that prints one JSON object; adds its seconds and peak memory to the object."""
    began, anonymous, resident = time.perf_counter(), 0, 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:  # its output fits into the pipe buffer
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            anonymous, resident = max(anonymous, _of(status, "RssAnon")), max(resident, _of(status, "VmHWM"))
            time.sleep(SAMPLE_SECONDS)
        printed, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    result: dict[str, Any] = json.loads(printed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        **result,
        "seconds": round(time.perf_counter() - began, 1),
        "user_seconds": round(after.ru_utime - before.ru_utime, 1),
        "system_seconds": round(after.ru_stime - before.ru_stime, 1),
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
    }


def _of(status: str, key: str) -> int:
    """Bytes of a line of /proc/PID/status; 0 without that line, as for a process that has ended."""
    match = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    main()
