"""Counts greedy answers that depend on concurrent requests: `python benchmarks/determinism.py --text FILE..`.

The same requests go to engines that differ in what must not change an answer: slots, prefill chunk, order and time of
arrival, and the cached prefix of a prompt. Prompts are passages of the text of 5 to 2,000 tokens; a third of them share
a prefix with an earlier one. Every fourth request uses the base model, the others use `--adapters` random adapters.
The script prints for each engine how many answers differ from the first engine's, and a JSON line at the end.
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

from decode import numbered_tokenizer, saved_adapters
from measure import PACKAGES, version_of
from octavo.hardware import Hardware, pick
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.peft import read
from octavo.store.resolve import open_source
from octavo.store.weights import load as load_weights
from octavo_method import random_model
from shapes import MODELS, shapes

Answer = tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """An engine and its load: slots, prefill chunk in tokens, mean number of requests that arrive in a decode step."""

    name: str
    slots: int
    chunk: int
    arrivals: float
    again: bool = False  # submits every request twice in succession: the second prompt is in the prefix cache


LOADS = {
    "alone": Load("alone", 1, 256, 0.0),
    "again": Load("again", 4, 256, 0.0, again=True),
    "8 slots": Load("8 slots", 8, 256, 0.3),
    "64 slots": Load("64 slots", 64, 128, 4.0),
    "16 slots": Load("16 slots", 16, 512, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="a folder, smollm2, or a model of shapes.py with random weights")
    add("--text", nargs="*", type=Path, default=[], help="text files for the prompts; default: random tokens")
    add("--scheme", default="int8")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--requests", type=int, default=500)
    add("--tokens", type=int, default=64, help="new tokens of each answer")
    add("--max-prompt", type=int, default=2000, help="tokens of the max_prompt prompt")
    add("--adapters", type=int, default=3)
    add("--alone", type=int, default=100, help="requests of the loads `alone` and `again`, which are slow")
    add(
        "--deterministic",
        action="store_true",
        help="deterministic also for more than 32 requests on a GPU",
    )
    add("--loads", default=",".join(LOADS))
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    hardware = pick(args.device, args.dtype)
    model, tokenizer = open_model(args, hardware)
    requests = random_requests(args, tokenizer, model.config.vocabulary)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapters = saved_adapters(model, args.adapters, Path(folder))
        first: dict[int, Answer] = {}
        differing = {}
        for name in args.loads.split(","):
            load, began = LOADS[name], time.perf_counter()
            count = args.alone if load.slots == 1 or load.again else len(requests)
            answers = answers_under(load, model, tokenizer, adapters, requests[:count], args)
            for number, answer in answers:
                first.setdefault(number, answer)
            wrong = sum(answer != first[number] for number, answer in answers)
            differing[name] = f"{wrong} of {len(answers)}"
            sys.stdout.write(f"{name}: {wrong} of {len(answers)} differ, {time.perf_counter() - began:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(
        json.dumps(
            {
                "differing": differing, "scheme": args.scheme, "dtype": str(hardware.dtype), "device": hardware.name,
                **{name: version_of(name) for name in PACKAGES}, "command": sys.argv[1:],
            }
        )
        + "\n"
    )  # fmt: skip


def open_model(args: argparse.Namespace, hardware: Hardware) -> tuple[Decoder, PreTrainedTokenizerFast]:
    if args.model in MODELS:
        model = random_model(args.model, args.scheme, device=hardware.device, dtype=hardware.dtype, tiny=False, seed=0)
        return model, numbered_tokenizer(shapes(args.model, tiny=False)["vocab_size"])
    source = open_source(args.model)
    return load_weights(
        source, scheme_named(args.scheme), dtype=hardware.dtype, device=hardware.device
    ), source.tokenizer()


def random_requests(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[Request]:
    """Greedy requests with prompt lengths that are log-uniform between 5 and --max-prompt tokens."""
    draw = random.Random(args.seed)
    ids = [id for path in args.text for id in tokenizer(path.read_text()).input_ids]
    if not ids:
        ids = [draw.randrange(vocab_size) for _ in range(50_000)]
    starts: list[int] = []
    requests = []
    for number in range(args.requests):
        length = min(args.max_prompt, round(5 * (args.max_prompt / 5) ** draw.random()))
        start = draw.choice(starts) if starts and number % 3 == 0 else draw.randrange(len(ids) - args.max_prompt)
        starts.append(start)
        adapter = number % (args.adapters + 1)
        requests.append(
            Request(
                tuple(ids[start : start + length]),
                Sampling(temperature=0.0, max_new_tokens=args.tokens),
                f"adapter-{adapter - 1}" if adapter else None,
            )
        )
    return requests


def answers_under(
    load: Load, model: Decoder, tokenizer: PreTrainedTokenizerFast, adapters: dict[str, Path], requests: list[Request],
    args: argparse.Namespace,
) -> list[tuple[int, Answer]]:  # fmt: skip
    """(index of the request, token ids of its answer) from a new engine under `load`."""
    limits = Limits(
        slots=load.slots,
        max_len=args.max_prompt + args.tokens,
        chunk=load.chunk,
        queue=len(requests),
        deterministic=args.deterministic,
    )
    engine = Engine(model, tokenizer, base="base", limits=limits)
    for name, folder in adapters.items():
        engine.load_adapter(name, read(folder))
    for task in engine.warmup_tasks():
        task()
    draw = random.Random(f"{args.seed} {load.name}")
    order = list(range(len(requests)))
    streams: list[tuple[int, Stream]] = []
    if load.arrivals:
        draw.shuffle(order)
        while order or engine.stats().running or engine.stats().waiting:
            while order and draw.random() < load.arrivals / (1 + load.arrivals):
                streams.append((order[0], engine.submit(requests[order.pop(0)])))
            engine.step()
    else:
        for number in order:
            for _ in range(2 if load.again else 1):
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
