"""How near `octavo tune` in a quarter of the time comes to a full grid of learning rates and ranks, on three tasks.

    python benchmarks/tune.py --model smollm2 --device cuda --out tune-benchmark
    python benchmarks/tune.py --model smollm2 --tasks answers --steps 24 --seq-len 64 --train-kb 24 --test-kb 8
    python benchmarks/tune.py --jobs 4 --gpus 4 --device cuda    # the grid in 4 processes, each on a GPU of its own

Tasks: `plays` (speeches of Shakespeare's plays), `answers` (generated questions with answers in a fixed style) and
`code` (Python sources of octavo). The full grid is `octavo tune` with unlimited time: each cell is one run of --steps
steps. `octavo tune` then gets a --share of the summed time of the grid, loading included. Both choose on one half of
the held-out text. The improvement of a cell over the base is measured in the full grid, on the other half:

    ratio = (loss of the base - loss of the cell that tune chose) / (the same of the cell that the grid chose)

Finished trials are in --out: an interrupted call with the same options goes on. Processes of --jobs that share a GPU or
cores slow each other, which gives `octavo tune` too much time: use one for each GPU. Results: --out/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLAYS = ROOT / "src" / "octavo" / "shakespeare"
TASKS = ("plays", "answers", "code")
TRIALS = "trials.jsonl"


def write_task(name: str, folder: Path, *, train_kb: float, test_kb: float) -> None:
    """Writes train.jsonl and test.jsonl of a task, whose documents differ."""
    draw = random.Random(0)
    records = {"plays": _plays, "answers": _answers, "code": _code}[name](draw)
    for side, size in (("test", test_kb), ("train", train_kb)):
        lines, used = [], 0
        while records and used < 1000 * size:
            lines.append(json.dumps(records.pop()))
            used += len(lines[-1])
        (folder / f"{side}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _plays(draw: random.Random) -> list[dict[str, str]]:
    """Groups of speeches; the held-out ones are of another play."""

    def speeches(path: Path) -> list[dict[str, str]]:
        parts = path.read_text("utf-8").split("\n\n")
        return [{"text": "\n\n".join(parts[start : start + 4])} for start in range(0, len(parts), 4)]

    training = [record for path in sorted((PLAYS / "train").glob("*.txt")) for record in speeches(path)]
    draw.shuffle(training)
    held_out = speeches(PLAYS / "test" / "hamlet.txt")
    draw.shuffle(held_out)
    return training + held_out  # `write_task` takes from the end


def _answers(draw: random.Random) -> list[dict[str, str]]:
    """Questions about lengths and prices, whose answers have a style and a calculation to be learned."""
    goods = ["apples", "nails", "candles", "stamps", "buttons", "bottles", "ropes", "lamps", "books", "cups"]
    found: dict[str, str] = {}
    while len(found) < 8000:
        count, price, thing = draw.randint(2, 99), draw.randint(2, 60), draw.choice(goods)
        if draw.random() < 0.5:
            question = f"How much are {count} {thing} at {price} cents each?"
            answer = f"[{thing}] {count} x {price} = {count * price} cents, so you pay {count * price / 100:.2f}."
        else:
            question = f"A rope of {count} feet and one of {price} feet: how long are both in inches?"
            answer = f"[length] ({count} + {price}) x 12 = {(count + price) * 12} inches in all."
        found[question] = answer
    records = [{"prompt": question, "completion": answer} for question, answer in found.items()]
    draw.shuffle(records)
    return records


def _code(draw: random.Random) -> list[dict[str, str]]:
    """Parts of Python files of 40 lines."""
    records = []
    for path in sorted((ROOT / "src" / "octavo").rglob("*.py")):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        records += [{"text": "".join(lines[start : start + 40])} for start in range(0, len(lines), 40)]
    draw.shuffle(records)
    return records


def arguments_of(options: argparse.Namespace, folder: Path, out: Path, rates: Sequence[str]) -> list[str]:
    """The command of a search, without --minutes."""
    command = [
        sys.executable, "-m", "octavo", "tune", "--model", options.model, "--device", options.device, "--data",
        str(folder / "train.jsonl"), "--test-data", str(folder / "test.jsonl"), "--lr", ",".join(rates), "--rank",
        options.rank, "--steps", str(options.steps), "--seq-len", str(options.seq_len), "--batch-size",
        str(options.batch_size), "--scheme", options.scheme, "--dtype", options.dtype, "--out", str(out), "--json",
    ]  # fmt: skip
    return [*command, "--resume"] if (out / TRIALS).exists() else command


def full_grid(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The lines of all trials of the grid; the processes share the learning rates."""
    rates = options.lr.split(",")
    running = []
    for job in range(min(options.jobs, len(rates))):
        out = folder / f"grid-{job}"
        environment = {**os.environ}
        if options.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(job % options.gpus)
        command = [*arguments_of(options, folder, out, rates[job :: options.jobs]), "--minutes", "1000000"]
        running.append((out, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)))
    lines = []
    for out, process in running:
        if process.wait():
            raise SystemExit(f"The grid in {out} failed; the same call goes on.")
        lines.append([json.loads(line) for line in (out / TRIALS).read_text().splitlines()])
    return [{**line, "job": job} for job, part in enumerate(lines) for line in part]


def seconds_of_grid(lines: Sequence[dict[str, Any]]) -> float:
    """The time of one process that loads once and tries every cell once (the defaults are in each process)."""
    total, latest, seen = 0.0, "", set()
    for line in lines:
        if line["kind"] == "time":
            total += line["seconds"] if latest else 0.0
            latest = ""
        elif line["kind"] == "base":
            latest = "base" if line["job"] == 0 else ""
        elif line["kind"] == "trial":
            latest = str(line["cell"]) if str(line["cell"]) not in seen else ""
            seen.add(str(line["cell"]))
    return total


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid and the search of a task; the result."""
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.jsonl").exists():
        write_task(name, folder, train_kb=options.train_kb, test_kb=options.test_kb)
    lines = full_grid(options, folder)
    base = next(line for line in lines if line["kind"] == "base")
    trials = {(line["cell"]["lr"], line["cell"]["rank"]): line for line in lines if line["kind"] == "trial"}
    finite = {cell: trial for cell, trial in trials.items() if trial["nats"] and math.isfinite(sum(trial["nats"]))}
    best = min(finite, key=lambda cell: sum(finite[cell]["nats"]))
    seconds = seconds_of_grid(lines)

    def gain(cell: tuple[float, int]) -> float:
        """Share of the loss of the base by which the loss is lower, on the half that chose nothing."""
        return 1 - float(sum(finite[cell]["verdict"])) / float(sum(base["verdict"]))

    command = arguments_of(options, folder, folder / "tune", options.lr.split(","))
    minutes = options.share * seconds / 60
    done = subprocess.run([*command, "--minutes", f"{minutes:.6g}"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"octavo tune failed on {name}.")
    result = json.loads(done.stdout)
    choice = (result["choice"]["lr"], result["choice"]["rank"])
    default = (result["default"]["lr"], result["default"]["rank"])
    return {
        "task": name,
        "cells": len(trials),
        "grid_seconds": seconds,
        "tune_seconds": result["seconds"],
        "grid_choice": best,
        "tune_choice": choice,
        "grid_gain": gain(best),
        "tune_gain": gain(choice) if choice in finite else None,
        "default_gain": gain(default),
        "ratio": gain(choice) / gain(best) if choice in finite else None,
        "beats_default": result["beats_default"],
        "against_default": result["against_default"],
        "complete": result["complete"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scheme", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--lr", default="1e-4,3e-4,1e-3,3e-3")
    parser.add_argument("--rank", default="4,16,64")
    parser.add_argument("--steps", type=int, default=128, help="of each cell of the grid")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--train-kb", type=float, default=400)
    parser.add_argument("--test-kb", type=float, default=60)
    parser.add_argument("--share", type=float, default=0.25, help="of the grid's time, for octavo tune")
    parser.add_argument("--jobs", type=int, default=1, help="processes of the grid")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the processes are spread over")
    parser.add_argument("--out", type=Path, default=Path("tune-benchmark"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks.split(","):
        if name not in TASKS:
            raise SystemExit(f"There is no task {name}: {', '.join(TASKS)}.")
        result = compare(name, options)
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
