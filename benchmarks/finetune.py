"""octavo beside its peers: tokens per second, memory and first loss of fine-tuning, every row in a process of its own.

    python benchmarks/finetune.py --suite quick
    python benchmarks/finetune.py --model gptj --rows peft-bf16,octavo-int8 --batch 1 --seq-len 2048 [--cap-gib 11]
    python benchmarks/finetune.py --suite full --gate --budget-s 550 --out results.csv
    python benchmarks/finetune.py --job article --model-dir DIR --text-dir src/octavo/shakespeare/train

Rows are appended to benchmarks/results.csv as they come; `python benchmarks/table.py` writes them into the table of
benchmarks/README.md, which also describes each way and the common conditions. A way that fails has its error in its
row, and the others continue. --tiny runs the same code on two narrow layers, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import table
from measure import GIB, REFERENCE, Setting, blank, compare_gradients, run_one
from shapes import MODELS

ROOT = Path(__file__).parents[1]
TINY_TOKENS = 64
__all__ = ["SUITES", "Setting", "article_job", "compare_gradients", "main"]


def settings(model: str, batch: int, seq_len: int, cap_gib: float | None, *ways: str) -> list[Setting]:
    """The same setting for several ways."""
    return [Setting(way, model, batch, seq_len, cap_gib) for way in ways]


# The order is that of importance: --budget-s cuts the end off.
QUICK = settings("gptj", 1, 2048, None, "article", "peft-nf4", "peft-bf16-sdpa", "octavo-int8", "octavo-nf4")
MEMORY = [
    *settings("gptj", 1, 2048, 11.0, "octavo-int8-8bit", "octavo-int8", "article", "peft-int8", "peft-int8-sdpa"),
    *settings("gptj", 1, 2048, 8.0, "octavo-int8-8bit", "octavo-int8", "article", "peft-nf4", "peft-nf4-sdpa"),
    *settings("gptj", 1, 2048, 6.0, "octavo-nf4-8bit", "octavo-nf4", "peft-nf4-sdpa"),
    *settings("llama", 4, 2048, 17.9, "octavo-int8-8bit", "octavo-int8", "peft-bf16"),
    *settings("llama", 4, 2048, 6.7, "octavo-nf4-8bit", "octavo-nf4", "peft-nf4-sdpa"),
]
FULL = [
    *settings("gptj", 1, 2048, None, "article", "peft-int8", "peft-nf4", "peft-bf16", "peft-nf4-sdpa"),
    *settings("gptj", 1, 2048, None, "peft-bf16-sdpa", "peft-bf16-sdpa-nockpt", "octavo-int8", "octavo-nf4"),
    *MEMORY,
    *settings("gptj", 4, 2048, None, "peft-nf4-sdpa", "peft-bf16-sdpa", "octavo-int8", "octavo-nf4"),
    *settings("llama", 4, 2048, None, "peft-bf16", "peft-nf4", "octavo-int8", "octavo-nf4"),
    *settings("gptj", 8, 2048, None, "peft-bf16-sdpa", "octavo-int8", "octavo-int8-8bit"),
    *settings("gptj", 1, 128, None, "article", "octavo-int8", "octavo-int8-8bit"),
]
SUITES = {"quick": QUICK, "memory": MEMORY, "full": FULL}


def main() -> None:
    asked = arguments().parse_args()
    if asked.one:
        run_one(Setting(**json.loads(asked.one)), wait=asked.wait)
        return
    table.check(asked.out)
    commit = asked.commit if asked.commit is not None else commit_of(ROOT)
    if asked.job:
        if not asked.model_dir:
            raise SystemExit("--job needs --model-dir: a model's folder, as full_size.py writes it.")
        size = {"model": asked.model or "gptj", "batch": asked.batch, "seq_len": asked.seq_len}
        row = article_job(asked.model_dir, asked.text_dir, **size, extra=asked.extra, limit_s=asked.limit_s)
        keep(row | {"commit": commit}, asked.out)
        return
    rows = chosen(asked) * asked.repeat
    with tempfile.TemporaryDirectory() as folder:
        if asked.gate:
            rows = with_references(rows, Path(folder))
        run_all(rows, asked, commit)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=SUITES, help="a named list of rows; --rows then keeps only those ways of it")
    add("--rows", default="", help="ways, with commas: those of peers.py, octavo-int8, octavo-nf4-8bit, unsloth-nf4..")
    add("--model", choices=MODELS, help="without --suite: gptj; with it: keep only this one's rows")
    add("--batch", type=int, default=1)
    add("--seq-len", type=int, default=2048)
    add("--cap-gib", type=float, help="what PyTorch may reserve, loading included: a smaller card")
    add("--steps", type=int, default=6, help="timed steps; 0: only the gate")
    add("--warmup", type=int, default=3, help="steps before them")
    add("--repeat", type=int, default=1, help="go through all rows so often, interleaved")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help=f"two narrow layers, rows of at most {TINY_TOKENS} tokens: does it run?")
    add("--gate", action="store_true", help="first compare every way's loss and gradients with a float32 reference")
    add("--limit-s", type=float, default=150.0, help="seconds that a row may take")
    add("--budget-s", type=float, default=float("inf"), help="seconds for all rows: those that do not fit are left out")
    add("--alloc", default="expandable_segments:True", help="PYTORCH_CUDA_ALLOC_CONF, the same for all")
    add("--no-prefetch", action="store_true", help="import the next row's libraries only when its turn has come")
    add("--out", type=Path, default=table.META_RESULTS)
    add("--commit", help="what to note as octavo's commit; default: what git says")
    add("--job", choices=["article"], help="the article's own job, from files to a saved adapter")
    add("--model-dir", type=Path)
    add("--text-dir", type=Path, default=ROOT / "src" / "octavo" / "shakespeare" / "train")
    add("--extra", nargs=argparse.REMAINDER, default=[], help="last: more options for `octavo finetune` in --job")
    add("--one", help=argparse.SUPPRESS)  # one row as JSON, in this process
    add("--wait", action="store_true", help=argparse.SUPPRESS)  # .. once a line comes on standard input
    return parser


def chosen(asked: argparse.Namespace) -> list[Setting]:
    """The rows that the command line asks for."""
    ways = [way for way in asked.rows.split(",") if way]
    if asked.suite:
        rows = [row for row in SUITES[asked.suite] if not ways or row.way in ways]
        rows = [row for row in rows if asked.model in (None, row.model)]
    else:
        rows = settings(asked.model or "gptj", asked.batch, asked.seq_len, asked.cap_gib, *ways)
    if not rows:
        raise SystemExit("No rows: give --suite or --rows, or see --help.")
    same = {"steps": asked.steps, "warmup": asked.warmup, "seed": asked.seed, "tiny": asked.tiny}
    rows = [replace(row, **same) for row in rows]
    return [replace(row, seq_len=min(row.seq_len, TINY_TOKENS), cap_gib=None) for row in rows] if asked.tiny else rows


def with_references(rows: Sequence[Setting], folder: Path) -> list[Setting]:
    """The rows, each preceded by the reference of its model, batch and length unless that came before."""
    listed: list[Setting] = []
    for row in rows:
        file = str(folder / f"{row.model}-{row.batch}-{row.seq_len}.pt")
        if file not in {before.reference for before in listed}:
            listed.append(replace(row, way=REFERENCE, cap_gib=None, steps=0, warmup=0, reference=file))
        listed.append(replace(row, reference=file))
    return listed


def run_all(rows: Sequence[Setting], asked: argparse.Namespace, commit: str) -> None:
    """All rows in order. While one runs, the next one's process imports its libraries and waits."""
    began = time.monotonic()
    waiting: Process | None = None
    known = {"card": "", "octavo": ""}  # a process that died could not say
    try:
        for number, row in enumerate(rows):
            left = asked.budget_s - (time.monotonic() - began)
            if left < min(asked.limit_s, asked.budget_s / 20):
                say(f"The budget is spent: {len(rows) - number} rows not run, from {row.way} on.")
                break
            process, waiting = waiting or Process(row, asked.alloc), None
            if not asked.no_prefetch and number + 1 < len(rows):
                waiting = Process(rows[number + 1], asked.alloc)
            result = process.result(min(asked.limit_s, left))
            known = {name: result[name] or value for name, value in known.items()}
            result.update(known)
            if row.way == REFERENCE:
                say(f"reference {row.model} {row.batch} x {row.seq_len}: loss {result['first_loss']} {result['note']}")
            elif left < asked.limit_s and "stopped after" in result["note"]:
                say(f"The budget is spent: {row.way} was stopped and is not kept.")
            else:
                keep(result | {"commit": commit}, asked.out)
    finally:
        if waiting:
            waiting.kill()


class Process:
    """One row in a process of its own: memory counters, allocator and failures are its own."""

    def __init__(self, row: Setting, alloc: str) -> None:
        given = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
        if alloc:
            given["PYTORCH_CUDA_ALLOC_CONF"] = alloc
        self.row = row
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (not a pipe: nobody reads it meanwhile)
        self.running = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--wait", "--one", json.dumps(asdict(row))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment(given),
            start_new_session=True,
        )  # fmt: skip

    def result(self, limit_s: float) -> dict[str, Any]:
        """Lets it begin. A process that dies or takes too long gives a row with a note instead of figures."""
        try:
            output, _ = self.running.communicate(b"go\n", timeout=max(1.0, limit_s))
            found = last_row(output.decode(errors="replace"))
            note = f"died with exit status {self.running.returncode}"
        except subprocess.TimeoutExpired:
            found, note = None, f"stopped after {limit_s:.0f} s"
        self.kill()
        if found is None:
            found = blank(self.row) | {"note": note}
        if found["note"]:
            self.errors.seek(0)
            sys.stderr.write(self.errors.read()[-3000:].decode(errors="replace") + "\n")
        return found

    def kill(self) -> None:
        """Ends it and whatever it started."""
        if self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
        self.running.wait()


def environment(more: dict[str, str]) -> dict[str, str]:
    """Ours, with this checkout's octavo found first."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def last_row(output: str) -> dict[str, Any] | None:
    """The last line that is a row; libraries may print what they like before it."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"date"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def keep(row: dict[str, Any], path: Path) -> None:
    """Into the file at once, and on the screen."""
    table.append(path, row)
    say(" | ".join(table.line_of(row)))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def commit_of(folder: Path) -> str:
    """The commit, with a + if files differ from it; "" where git or the repository is missing."""
    try:
        ask = ["git", "-C", str(folder)]
        name = subprocess.run([*ask, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def article_job(
    model_dir: Path,
    text_dir: Path,
    *,
    model: str = "gptj",
    batch: int = 1,
    seq_len: int = 2048,
    extra: Sequence[str] = (),
    limit_s: float = 3600.0,
) -> dict[str, Any]:
    """The article's job as a row: one pass over the texts by `octavo finetune`, from files to a saved adapter.

    Seconds are the command's, from its start to its end, loading included; memory is the peak that its JSON answer
    has; tokens per second are all steps' tokens over all seconds. The note holds the bytes of text and the tokens.
    """
    texts = sum(file.stat().st_size for file in text_dir.rglob("*") if file.is_file())
    row = blank(Setting("octavo finetune", model, batch, seq_len, steps=0, warmup=0))
    row["note"] = f"one pass over {texts / 1e6:.2f} MB of text"
    options = ["--model", str(model_dir), "--data", str(text_dir), "--test-fraction", "0", "--epochs", "1"]
    options += ["--batch", str(batch), "--seq-len", str(seq_len), *extra]
    row["command"] = "octavo finetune " + " ".join(options)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "octavo", "finetune", *options, "--out", str(out), "--json"]
        began = time.perf_counter()
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment({}))
        except subprocess.TimeoutExpired:
            return row | {"note": f"{row['note']}; stopped after {limit_s:.0f} s"}
        seconds = time.perf_counter() - began
        if ran.returncode:
            sys.stderr.write(ran.stderr[-3000:] + "\n")
            last = " ".join(ran.stderr.strip().splitlines()[-2:])[-200:]
            return row | {"note": f"{row['note']}; exit status {ran.returncode}: {last}"}
        answer = json.loads(ran.stdout)
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    tokens = sum(event["tokens"] for event in steps)
    row["note"] += f", {tokens:,} tokens"
    row.update(seconds=round(seconds, 1), steps=answer["steps"], first_loss=round(steps[0]["loss"], 6))
    row.update(tokens_per_second=round(tokens / seconds, 1), **job_memory(answer["peak_memory_bytes"]), **where())
    return row


def job_memory(peak_bytes: int) -> dict[str, float]:
    """The answer has one peak, over loading and training: what PyTorch reserved on a card, RAM on a CPU."""
    peak = round(peak_bytes / GIB, 3)
    return {"peak_reserved_gib": peak, "load_reserved_gib": peak}


def where() -> dict[str, str]:
    """The card and octavo's version, asked in a process of its own: this one never touches the GPU."""
    ask = (
        "import json, torch, octavo; from octavo.hardware import pick;"
        "print(json.dumps({'card': pick().name, 'octavo': octavo.__version__}))"
    )
    ran = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment({}))
    found: dict[str, str] = json.loads(ran.stdout.strip().splitlines()[-1]) if ran.returncode == 0 else {}
    return found


if __name__ == "__main__":
    main()
