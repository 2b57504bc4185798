"""Generation on one device, octavo beside its peers in one run: `python benchmarks/decode.py [--batches 1,8,32,64]`.

Each way holds the same random weights (shapes.py) and continues prompts of random tokens, greedily, so many of them at
once. octavo runs as it serves: the engine of infer/engine.py with its queue, its text and its slots; `--adapters`
puts so many adapters on it, one for each request in turn. The peers are transformers' `generate` on transformers' and
bitsandbytes' layers. `tokens_per_s` counts the tokens after the first one of every request, over the time from the
last first token to the end; `first_s` is how long all prompts took. Rows are appended to `decode.csv` with card,
versions and command. `--profile` prints where octavo's time goes on a card.
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
from octavo_way import random_model
from shapes import MODELS, RANK, shapes
from table import append

GIB = 2**30
Row = dict[str, Any]
COLUMNS = (
    "model", "way", "batch", "prompt", "adapters", "tokens_per_s", "step_ms", "first_s", "peak_gib", "tokens", "card",
    *PACKAGES, "commit", "command",
)  # fmt: skip
WAYS = ("octavo-int8", "octavo-none", "octavo-nf4", "transformers-bf16", "transformers-int8", "transformers-nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="gptj")
    add("--ways", default="octavo-int8,transformers-bf16,transformers-int8,transformers-nf4")
    add("--batches", default="1,8,32,64")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--tokens", type=int, default=128, help="new tokens of octavo")
    add("--peer-tokens", type=int, default=32, help="new tokens of a peer: they are slow")
    add("--max-len", type=int, default=512, help="positions of a slot")
    add("--adapters", type=int, default=0)
    add("--deterministic", action="store_true", help="octavo: a row's bits do not depend on the number of rows")
    add("--tiny", action="store_true")
    add("--profile", action="store_true")
    add("--commit", default="")
    add("--out", default=str(Path(__file__).with_name("decode.csv")))
    asked = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hardware = pick()
    for way in asked.ways.split(","):
        if way not in WAYS:
            parser.error(f"there is no way {way!r}: {', '.join(WAYS)}")
        measure = octavo_way if way.startswith("octavo-") else peer_way
        for batch, figures in measure(way.partition("-")[2], asked, hardware):
            row = {
                "model": f"{asked.model}{'-tiny' if asked.tiny else ''}", "way": way, "batch": batch,
                "prompt": asked.prompt, "adapters": asked.adapters if measure is octavo_way else 0,
                **figures, "card": hardware.name, **{name: version_of(name) for name in PACKAGES},
                "commit": asked.commit,
                "command": shlex.join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
            }  # fmt: skip
            append(Path(asked.out), row, COLUMNS)
            sys.stdout.write(", ".join(f"{name} {value}" for name, value in list(row.items())[:10]) + "\n")
            sys.stdout.flush()
        gc.collect()
        if hardware.device.type == "cuda":  # the next way's peak is its own
            torch.cuda.empty_cache()
            peak(hardware.device)


def octavo_way(scheme: str, asked: argparse.Namespace, hardware: Hardware) -> Iterator[tuple[int, Row]]:
    """(batch, figures) of octavo's engine."""
    dtype = hardware.dtype
    model = random_model(asked.model, scheme, device=hardware.device, dtype=dtype, tiny=asked.tiny, seed=0)
    words = shapes(asked.model, tiny=asked.tiny)["vocab_size"]
    tokenizer = numbers(words)
    with tempfile.TemporaryDirectory() as folder:
        adapters = saved_adapters(model, asked.adapters, Path(folder))
        yield from octavo_rows(model, tokenizer, adapters, words, asked, hardware)


def octavo_rows(
    model: Decoder, tokenizer: PreTrainedTokenizerFast, adapters: dict[str, Path], words: int,
    asked: argparse.Namespace, hardware: Hardware,
) -> Iterator[tuple[int, Row]]:  # fmt: skip
    names: list[str | None] = list(adapters) or [None]
    for batch in batches(asked):
        limits = Limits(
            slots=batch, max_len=asked.max_len, chunk=4 * asked.prompt, queue=batch, deterministic=asked.deterministic
        )
        engine = Engine(model, tokenizer, base="base", limits=limits)
        for name, own in adapters.items():
            engine.load_adapter(name, own)
        for piece in engine.warmup_tasks():
            piece()
        sampling = Sampling(temperature=0.0, max_new_tokens=asked.tokens)
        figures: Row = {}
        for _ in range(2):  # the first time warms up what prompts need
            prompts = torch.randint(words, (batch, asked.prompt)).tolist()
            asking = [Request(tuple(ids), sampling, names[n % len(names)]) for n, ids in enumerate(prompts)]
            figures = timed(engine, asking, asked, hardware.device)
        yield batch, figures
        if asked.profile:
            profiled(engine, asking)
        for name in engine.adapters():
            engine.remove_adapter(name)
        del engine


def timed(engine: Engine, requests: list[Request], asked: argparse.Namespace, device: torch.device) -> Row:
    """The figures of so many requests at once."""
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
        "first_s": round(first - began, 3), "peak_gib": peak(device), "tokens": asked.tokens,
    }  # fmt: skip


def saved_adapters(model: Decoder, count: int, folder: Path) -> dict[str, Path]:
    """Folders of so many adapters on every linear of the blocks, none of which leaves the output as it is."""
    plan = AdapterPlan(LoraSpec(RANK, 2.0 * RANK))
    found = {}
    for number in range(count):
        create_(model, plan, seed=number)
        for name, parameter in trained(model).items():
            if name.endswith("lora_B"):
                parameter.data.normal_(0, 0.01)
        found[f"adapter-{number}"] = folder / str(number)
        found[f"adapter-{number}"].mkdir()
        save(found[f"adapter-{number}"], model, plan, base="base", origin={}, card="")
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.lora.clear()
    return found


def profiled(engine: Engine, requests: list[Request]) -> None:
    """Prints what ten steps spend on a card."""
    from torch.profiler import ProfilerActivity, profile

    for request in requests:
        engine.submit(request)
    while engine.stats().waiting:
        engine.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        began = time.perf_counter()
        for _ in range(10):
            engine.step()
        seconds = time.perf_counter() - began
    averages = found.key_averages()
    sys.stdout.write(averages.table(sort_by="self_device_time_total", row_limit=24, max_name_column_width=60) + "\n")
    sys.stdout.write(f"ten steps with the profiler on: {seconds * 1e3:.1f} ms\n")
    while engine.stats().running:
        engine.step()


def peer_way(weights: str, asked: argparse.Namespace, hardware: Hardware) -> Iterator[tuple[int, Row]]:
    """(batch, figures) of transformers' generate."""
    device = hardware.device
    model = peers.frozen_model(weights, asked.model, seed=0, device=device, tiny=asked.tiny).eval()
    model.config.use_cache = True
    words = shapes(asked.model, tiny=asked.tiny)["vocab_size"]

    def run(batch: int, count: int) -> float:
        ids = torch.randint(words, (batch, asked.prompt), device=device)
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=weights == "int8"):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
                pad_token_id=0,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for batch in batches(asked):
        run(batch, 2)
        first = run(batch, 1)
        seconds = run(batch, asked.peer_tokens) - first
        count = asked.peer_tokens - 1
        yield batch, {
            "tokens_per_s": round(batch * count / seconds, 1), "step_ms": round(seconds / count * 1e3, 3),
            "first_s": round(first, 3), "peak_gib": peak(device), "tokens": asked.peer_tokens,
        }  # fmt: skip


def batches(asked: argparse.Namespace) -> list[int]:
    return [int(batch) for batch in asked.batches.split(",")]


def peak(device: torch.device) -> float | None:
    """GiB reserved at most since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_reserved() / GIB
    torch.cuda.reset_peak_memory_stats()
    return round(found, 2)


def numbers(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers, for a vocabulary of any size."""
    table = {f"w{number}": number for number in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="w0")))


if __name__ == "__main__":
    main()
