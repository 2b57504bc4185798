"""Counts greedy answers that depend on what runs beside them: `python benchmarks/determinism.py --text FILE..`.

The same requests are put to engines that differ in all that may not matter: slots, prefill chunk, the order and the
time of arrival, and what the cache already holds of a prompt. Prompts are passages of the text of 5 to 2,000 tokens, a
third of them begin like an earlier one, in whole or in part; every fourth goes to the base, the others to `--adapters`
random adapters. Each pass prints how many of its answers differ from the first pass; a JSON line sums up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from decode import numbers, saved_adapters
from measure import PACKAGES, version_of
from octavo.hardware import Hardware, pick
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.resolve import open_source
from octavo.store.weights import load
from octavo_way import random_model
from shapes import MODELS, shapes

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Pass:
    """One way to ask: slots and chunk of the engine, requests that arrive within a step on average, times asked."""

    name: str
    slots: int
    chunk: int
    arrivals: float
    again: bool = False  # each request twice, one after the other: the second finds its prompt in the cache


PASSES = {
    "alone": Pass("alone", 1, 256, 0.0),
    "again": Pass("again", 4, 256, 0.0, again=True),
    "8 slots": Pass("8 slots", 8, 256, 0.3),
    "64 slots": Pass("64 slots", 64, 128, 4.0),
    "16 slots": Pass("16 slots", 16, 512, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="a folder, smollm2, or a shape of shapes.py with random weights")
    add("--text", nargs="*", type=Path, default=[], help="files to take prompts from; without them random tokens")
    add("--scheme", default="int8")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--requests", type=int, default=500)
    add("--tokens", type=int, default=64, help="new tokens of an answer")
    add("--longest", type=int, default=2000, help="tokens of the longest prompt")
    add("--adapters", type=int, default=3)
    add("--alone", type=int, default=100, help="requests of the passes `alone` and `again`, which are slow")
    add("--deterministic", action="store_true", help="also where a GPU decodes more than 32 requests at once")
    add("--passes", default=",".join(PASSES))
    add("--seed", type=int, default=0)
    asked = parser.parse_args()
    hardware = pick(asked.device, asked.dtype)
    model, tokenizer = opened(asked, hardware)
    requests = drawn(asked, tokenizer, model.config.vocabulary)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapters = saved_adapters(model, asked.adapters, Path(folder))
        first: dict[int, Answer] = {}
        differing = {}
        for name in asked.passes.split(","):
            way, began = PASSES[name], time.perf_counter()
            count = asked.alone if way.slots == 1 or way.again else len(requests)
            answers = asking(model, tokenizer, adapters, requests[:count], way, asked)
            for number, found in answers:
                first.setdefault(number, found)
            wrong = sum(found != first[number] for number, found in answers)
            differing[name] = f"{wrong} of {len(answers)}"
            sys.stdout.write(f"{name}: {wrong} of {len(answers)} differ, {time.perf_counter() - began:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(
        json.dumps(
            {
                "differing": differing, "scheme": asked.scheme, "dtype": str(hardware.dtype), "device": hardware.name,
                **{name: version_of(name) for name in PACKAGES}, "command": sys.argv[1:],
            }
        )
        + "\n"
    )  # fmt: skip


def opened(asked: argparse.Namespace, hardware: Hardware) -> tuple[Decoder, PreTrainedTokenizerFast]:
    if asked.model in MODELS:
        model = random_model(
            asked.model, asked.scheme, device=hardware.device, dtype=hardware.dtype, tiny=False, seed=0
        )
        return model, numbers(shapes(asked.model, tiny=False)["vocab_size"])
    source = open_source(asked.model)
    return load(source, scheme_named(asked.scheme), dtype=hardware.dtype, device=hardware.device), source.tokenizer()


def drawn(asked: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, words: int) -> list[Request]:
    """The requests, with prompts of lengths that are even on a logarithmic scale."""
    draw = random.Random(asked.seed)
    ids = [id for path in asked.text for id in tokenizer(path.read_text()).input_ids]
    if not ids:
        ids = [draw.randrange(words) for _ in range(50_000)]
    starts: list[int] = []
    requests = []
    for number in range(asked.requests):
        length = min(asked.longest, round(5 * (asked.longest / 5) ** draw.random()))
        start = draw.choice(starts) if starts and number % 3 == 0 else draw.randrange(len(ids) - asked.longest)
        starts.append(start)
        adapter = number % (asked.adapters + 1)
        requests.append(
            Request(
                tuple(ids[start : start + length]),
                Sampling(temperature=0.0, max_new_tokens=asked.tokens),
                f"adapter-{adapter - 1}" if adapter else None,
            )
        )
    return requests


def asking(
    model: Decoder, tokenizer: PreTrainedTokenizerFast, adapters: dict[str, Path], requests: list[Request], way: Pass,
    asked: argparse.Namespace,
) -> list[tuple[int, Answer]]:  # fmt: skip
    """(number of the request, tokens of its answer) of one pass, through an engine of its own."""
    limits = Limits(
        slots=way.slots,
        max_len=asked.longest + asked.tokens,
        chunk=way.chunk,
        queue=len(requests),
        deterministic=asked.deterministic,
    )
    engine = Engine(model, tokenizer, base="base", limits=limits)
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    for piece in engine.warmup_tasks():
        piece()
    draw = random.Random(f"{asked.seed} {way.name}")
    order = list(range(len(requests)))
    streams: list[tuple[int, Stream]] = []
    if way.arrivals:
        draw.shuffle(order)
        while order or engine.stats().running or engine.stats().waiting:
            while order and draw.random() < way.arrivals / (1 + way.arrivals):
                streams.append((order[0], engine.submit(requests[order.pop(0)])))
            engine.step()
    else:
        for number in order:
            for _ in range(2 if way.again else 1):
                streams.append((number, engine.submit(requests[number])))
                while engine.stats().running or engine.stats().waiting:
                    engine.step()
    answers = []
    for number, stream in streams:
        tokens = stream.ready()
        assert not stream.error, stream.error
        answers.append((number, tuple(token.token_id for token in tokens)))
    for name in adapters:
        engine.remove_adapter(name)
    return answers


if __name__ == "__main__":
    main()
