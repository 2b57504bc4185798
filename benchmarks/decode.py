"""Measures generation of octavo and its peers on one device: `python benchmarks/decode.py [--batches 1,8,32,64]`.

Every method has the same random weights (shapes.py) and decodes a batch of random prompts greedily. octavo runs the
engine of `octavo serve` (infer/engine.py): queue, slots and detokenization included; `--adapters N` loads N adapters
and assigns them to the requests in turn. The peers are transformers' `generate` with the linears of transformers and
of bitsandbytes. `tokens_per_s` counts the tokens after the first of every request, divided by the time from the last
first token to the end; `first_s` is the time until all requests have their first token. Rows are appended to
`decode.csv` with GPU, versions and command. `--profile` prints the time of octavo's kernels on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import peers
from measure import PACKAGES, version_of
from octavo.adapters import AdapterPlan, create_, save, trained
from octavo.hardware import Hardware, pick
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling
from octavo.layers.frozen import FrozenLinear
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.store.peft import read
from octavo_method import random_model
from shapes import MODELS, RANK, shapes
from table import append

GIB = 2**30
Row = dict[str, Any]
COLUMNS = (
    "model", "method", "batch", "prompt", "adapters", "tokens_per_s", "step_ms", "first_s", "peak_gib", "tokens", "gpu",
    *PACKAGES, "commit", "command",
)  # fmt: skip
METHODS = ("octavo-int8", "octavo-none", "octavo-nf4", "transformers-bf16", "transformers-int8", "transformers-nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="gptj")
    add("--methods", default="octavo-int8,transformers-bf16,transformers-int8,transformers-nf4")
    add("--batches", default="1,8,32,64")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--tokens", type=int, default=128, help="new tokens of a request to octavo")
    add("--peer-tokens", type=int, default=32, help="new tokens of a request to a peer, which are slower")
    add("--max-len", type=int, default=512, help="positions of a slot")
    add("--adapters", type=int, default=0, help="number of adapters that octavo serves")
    add("--deterministic", action="store_true", help="octavo: results that do not depend on the batch size")
    add("--tiny", action="store_true")
    add("--profile", action="store_true")
    add("--commit", default="")
    add("--out", default=str(Path(__file__).with_name("decode.csv")))
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hardware = pick()
    for method in args.methods.split(","):
        if method not in METHODS:
            parser.error(f"there is no method {method!r}: {', '.join(METHODS)}")
        measure = octavo if method.startswith("octavo-") else transformers_generate
        for batch, measured in measure(method.partition("-")[2], args, hardware):
            row = {
                "model": f"{args.model}{'-tiny' if args.tiny else ''}", "method": method, "batch": batch,
                "prompt": args.prompt, "adapters": args.adapters if measure is octavo else 0,
                **measured, "gpu": hardware.name, **{name: version_of(name) for name in PACKAGES},
                "commit": args.commit,
                "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
            }  # fmt: skip
            append(Path(args.out), row, COLUMNS)
            sys.stdout.write(", ".join(f"{name} {value}" for name, value in list(row.items())[:10]) + "\n")
            sys.stdout.flush()
        gc.collect()
        if hardware.device.type == "cuda":  # the peak of the next method starts from zero
            torch.cuda.empty_cache()
            peak(hardware.device)


def octavo(scheme: str, args: argparse.Namespace, hardware: Hardware) -> Iterator[tuple[int, Row]]:
    """Yields (batch, measured columns) of octavo's engine."""
    dtype = hardware.dtype
    model = random_model(args.model, scheme, device=hardware.device, dtype=dtype, tiny=args.tiny, seed=0)
    vocab_size = shapes(args.model, tiny=args.tiny)["vocab_size"]
    tokenizer = numbered_tokenizer(vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        adapters = saved_adapters(model, args.adapters, Path(folder))
        yield from measure_octavo(model, tokenizer, adapters, vocab_size, args, hardware)


def measure_octavo(
    model: Decoder, tokenizer: PreTrainedTokenizerFast, adapters: dict[str, Path], vocab_size: int,
    args: argparse.Namespace, hardware: Hardware,
) -> Iterator[tuple[int, Row]]:  # fmt: skip
    names: list[str | None] = list(adapters) or [None]
    for batch in batches(args):
        limits = Limits(
            slots=batch, max_len=args.max_len, chunk=4 * args.prompt, queue=batch, deterministic=args.deterministic
        )
        engine = Engine(model, tokenizer, base="base", limits=limits)
        for name, folder in adapters.items():
            engine.load_adapter(name, read(folder))
        for task in engine.warmup_tasks():
            task()
        sampling = Sampling(temperature=0.0, max_new_tokens=args.tokens)
        measured: Row = {}
        for _ in range(2):  # the first iteration warms up prefill
            prompts = torch.randint(vocab_size, (batch, args.prompt)).tolist()
            requests = [Request(tuple(ids), sampling, names[n % len(names)]) for n, ids in enumerate(prompts)]
            measured = timed(engine, requests, args, hardware.device)
        yield batch, measured
        if args.profile:
            profiled(engine, requests)
        for name in engine.adapters():
            engine.remove_adapter(name)
        del engine


def timed(engine: Engine, requests: list[Request], args: argparse.Namespace, device: torch.device) -> Row:
    """Measures concurrent requests: decode speed after the last first token, and the time until then."""
    streams = [engine.submit(request) for request in requests]
    before = engine.stats()
    began = time.perf_counter()
    while any(stream.first_token is None for stream in streams):
        engine.step()
    first, middle = time.perf_counter(), engine.stats()
    while engine.stats().running:
        engine.step()
    seconds = time.perf_counter() - first
    tokens = engine.stats().generated_tokens_total - middle.generated_tokens_total
    steps = engine.stats().steps_total - middle.steps_total
    assert engine.stats().finished_total - before.finished_total == len(requests)
    return {
        "tokens_per_s": round(tokens / seconds, 1), "step_ms": round(seconds / steps * 1e3, 3),
        "first_s": round(first - began, 3), "peak_gib": peak(device), "tokens": args.tokens,
    }  # fmt: skip


def saved_adapters(model: Decoder, count: int, folder: Path) -> dict[str, Path]:
    """Writes `count` adapters with nonzero B on every linear of the blocks; returns their folders by name."""
    plan = AdapterPlan(LoraSpec(RANK, 2.0 * RANK))
    folders = {}
    for number in range(count):
        create_(model, plan, seed=number)
        for name, parameter in trained(model).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(0, 0.01)
        folders[f"adapter-{number}"] = folder / str(number)
        folders[f"adapter-{number}"].mkdir()
        save(folders[f"adapter-{number}"], model, plan, base="base", origin={}, readme="")
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.lora.clear()
    return folders


def profiled(engine: Engine, requests: list[Request]) -> None:
    """Prints the GPU time of ten decode steps by kernel."""
    from torch.profiler import ProfilerActivity, profile

    for request in requests:
        engine.submit(request)
    while engine.stats().waiting:
        engine.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        for _ in range(10):
            engine.step()
        seconds = time.perf_counter() - began
    averages = profiler.key_averages()
    sys.stdout.write(averages.table(sort_by="self_device_time_total", row_limit=24, max_name_column_width=60) + "\n")
    sys.stdout.write(f"ten steps with the profiler on: {seconds * 1e3:.1f} ms\n")
    while engine.stats().running:
        engine.step()


def transformers_generate(weights: str, args: argparse.Namespace, hardware: Hardware) -> Iterator[tuple[int, Row]]:
    """Yields (batch, measured columns) of transformers' `generate`."""
    device = hardware.device
    model = peers.frozen_model(weights, args.model, seed=0, device=device, tiny=args.tiny, dtype=torch.bfloat16).eval()
    model.config.use_cache = True
    vocab_size = shapes(args.model, tiny=args.tiny)["vocab_size"]

    def run(batch: int, count: int) -> float:
        ids = torch.randint(vocab_size, (batch, args.prompt), device=device)
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=weights == "int8"):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
                pad_token_id=0,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for batch in batches(args):
        run(batch, 2)
        first = run(batch, 1)
        seconds = run(batch, args.peer_tokens) - first
        count = args.peer_tokens - 1
        yield batch, {
            "tokens_per_s": round(batch * count / seconds, 1), "step_ms": round(seconds / count * 1e3, 3),
            "first_s": round(first, 3), "peak_gib": peak(device), "tokens": args.peer_tokens,
        }  # fmt: skip


def batches(args: argparse.Namespace) -> list[int]:
    return [int(batch) for batch in args.batches.split(",")]


def peak(device: torch.device) -> float | None:
    """Peak of reserved memory since the last call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.max_memory_reserved() / GIB
    torch.cuda.reset_peak_memory_stats()
    return round(reserved, 2)


def numbered_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens w0, w1, .. for a vocabulary of any size."""
    vocabulary = {f"w{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))


if __name__ == "__main__":
    main()
