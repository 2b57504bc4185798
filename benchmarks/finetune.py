"""Measures fine-tuning with octavo and its peers: tokens per second, memory and first loss, one process per row.

    python benchmarks/finetune.py --suite quick
    python benchmarks/finetune.py --model gptj --rows peft-bf16,octavo-int8 --batch 1 --seq-len 2048 [--cap-gib 11]
    python benchmarks/finetune.py --suite full --gate --budget-s 550 --out results.csv
    python benchmarks/finetune.py --job article --model-dir DIR --text-dir src/octavo/shakespeare/train

Every row is appended to benchmarks/results.csv when it is done; `python benchmarks/table.py` writes the table of
benchmarks/README.md, which also describes the methods and the common conditions. If a method fails, its row has the
error and the next row runs. --tiny runs the same code on two narrow layers, also on a CPU.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import table
from measure import GIB, Setting, blank, compare_gradients, run_one
from shapes import MODELS

ROOT = Path(__file__).parents[1]
TINY_TOKENS = 64
DEQUANTIZED = ("nf4-double", "nf4", "int8")  # octavo's schemes with a reference of peers.py, the longest name first
RESTRICTED = ROOT / "benchmarks" / "restricted.csv"  # rows of --pretend, which are no rows of the GPUs that they name
# A program that prints the result of `gpu_and_version`; its argument is the GPU of --pretend.
GPU_AND_VERSION = """
import json, sys
import octavo
from octavo.errors import UsageError
from octavo.hardware import pick, pretend_
try:
    here = pick()
    gpu = here.name
    for name in sys.argv[1:]:
        gpu += f" restricted to {pretend_(name, here).name}"
except UsageError as error:
    raise SystemExit(str(error))
print(json.dumps({"gpu": gpu, "octavo": octavo.__version__}))
"""
__all__ = ["SUITES", "Setting", "article_job", "compare_gradients", "main"]


class Reference(NamedTuple):
    """A reference that a row needs: its method, its file, and the file that it is compared with."""

    method: str
    file: str
    original: str | None


def settings(model: str, batch: int, seq_len: int, cap_gib: float | None, *methods: str) -> list[Setting]:
    """One setting for several methods."""
    return [Setting(method, model, batch, seq_len, cap_gib) for method in methods]


# In order of importance: --budget-s omits the last rows.
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
    args = argument_parser().parse_args()
    if args.one:
        run_one(Setting(**json.loads(args.one)), wait=args.wait)
        return
    args.out = args.out or (RESTRICTED if args.pretend else table.RESULTS)
    table.check(args.out)
    if any(option.split("=")[0] == "--pretend" for option in args.extra):
        raise SystemExit("Give --pretend before --extra, so that the row says on which GPU the job ran.")
    known = gpu_and_version(args.pretend) if args.pretend or args.job else {}
    commit = args.commit if args.commit is not None else commit_of(ROOT)
    if args.job:
        if not args.model_dir:
            raise SystemExit("--job needs --model-dir, a model's folder as full_size.py writes it.")
        size = {"model": args.model or "gptj", "batch": args.batch, "seq_len": args.seq_len}
        extra = [*(["--pretend", args.pretend] if args.pretend else []), *args.extra]
        row = article_job(args.model_dir, args.text_dir, **size, extra=extra, limit_s=args.limit_s)
        write_row(row | known | {"commit": commit}, args.out)
        return
    rows = selected_rows(args) * args.repeat
    with tempfile.TemporaryDirectory() as temporary:
        if args.gate:
            folder = args.references or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            rows = with_references(rows, folder, dequantized=args.gate == "dequantized")
        run_all(rows, args, commit, known=known)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=SUITES, help="a named list of rows; --rows then selects methods of it")
    add(
        "--rows",
        default="",
        help="methods, separated by commas: peft-nf4, octavo-nf4-8bit, unsloth-nf4, ..",
    )
    add("--model", choices=MODELS, help="default: gptj; with --suite: select the rows of this model")
    add("--batch", type=int, default=1)
    add("--seq-len", type=int, default=2048)
    add("--cap-gib", type=float, help="limit of the memory that PyTorch reserves, to simulate a smaller GPU")
    add("--steps", type=int, default=6, help="timed steps; 0: only the gate")
    add("--warmup", type=int, default=3, help="steps before the timed steps")
    add("--repeat", type=int, default=1, help="number of passes over all rows")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help=f"two narrow layers, at most {TINY_TOKENS} tokens: a test of this script")
    add(
        "--gate",
        nargs="?",
        const="original",
        choices=["original", "dequantized"],
        help="first compare loss and gradients of each method with a float32 reference: of the original weights "
        "(default), or of the dequantized ones, for the error of arithmetic alone (octavo's int8, nf4 and nf4-double; "
        "the other methods are compared with the original weights)",
    )
    add("--references", type=Path, help="folder that keeps the references of --gate for other runs")
    add("--pretend", help="run as on this GPU, with its types, kernels, attention and memory: T4, 1080Ti, ..")
    add("--limit-s", type=float, default=150.0, help="time limit of a row in seconds")
    add("--budget-s", type=float, default=float("inf"), help="time limit of all rows; later rows are omitted")
    add("--alloc", default="expandable_segments:True", help="PYTORCH_CUDA_ALLOC_CONF of all methods")
    add("--no-prefetch", action="store_true", help="do not import the next row's libraries while a row runs")
    add("--out", type=Path, help="default: results.csv of this folder; with --pretend: restricted.csv")
    add("--commit", help="octavo's commit for the row; default: from git")
    add("--job", choices=["article"], help="the fine-tuning job of the article, from files to a saved adapter")
    add("--model-dir", type=Path)
    add("--text-dir", type=Path, default=ROOT / "src" / "octavo" / "shakespeare" / "train")
    add(
        "--extra",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of `octavo finetune` for --job; must be last",
    )
    add("--one", help=argparse.SUPPRESS)  # measure one row, given as JSON, in this process
    add("--wait", action="store_true", help=argparse.SUPPRESS)  # start after a line on standard input
    return parser


def selected_rows(args: argparse.Namespace) -> list[Setting]:
    """The rows that the command line selects."""
    methods = [method for method in args.rows.split(",") if method]
    if args.suite:
        rows = [row for row in SUITES[args.suite] if not methods or row.method in methods]
        rows = [row for row in rows if args.model in (None, row.model)]
    else:
        rows = settings(args.model or "gptj", args.batch, args.seq_len, args.cap_gib, *methods)
    if not rows:
        raise SystemExit("No rows selected: use --suite or --rows (see --help).")
    same = {"steps": args.steps, "warmup": args.warmup, "seed": args.seed, "tiny": args.tiny, "pretend": args.pretend}
    rows = [replace(row, **same) for row in rows]
    return [replace(row, seq_len=min(row.seq_len, TINY_TOKENS), cap_gib=None) for row in rows] if args.tiny else rows


def with_references(rows: Sequence[Setting], folder: Path, *, dequantized: bool = False) -> list[Setting]:
    """Inserts the reference of every (model, batch, seq_len), if `folder` does not have it, before its first row.

    `dequantized`: also that of the dequantized weights, for the methods that have one.
    """
    listed: list[Setting] = []
    for row in rows:
        file = original = str(folder / f"{row.model}-{row.batch}-{row.seq_len}-{row.seed}{'-tiny' * row.tiny}.pt")
        needed = [Reference("reference", file, None)]
        if dequantized and (method := dequantized_reference(row.method)):
            needed.append(Reference(method, file := f"{original}-{method}", original))
        for name, path, before in needed:
            if path not in {earlier.reference for earlier in listed} and not Path(path).exists():
                made = replace(row, method=name, reference=path, original=before, cap_gib=None, pretend=None)
                listed.append(replace(made, steps=0, warmup=0))
        listed.append(replace(row, reference=file, original=needed[-1].original))
    return listed


def dequantized_reference(method: str) -> str | None:
    """The reference with the dequantized weights of a method, None if there is none.

    Peers have none: PEFT and Unsloth do not quantize embedding and head, as octavo's schemes do, and the article's
    8-bit type rounds other values.
    """
    scheme = next((each for each in DEQUANTIZED if f"{method}-".startswith(f"octavo-{each}-")), None)
    return scheme and f"reference-{scheme}"


def run_all(
    rows: Sequence[Setting], args: argparse.Namespace, commit: str, *, known: Mapping[str, str] | None = None
) -> None:
    """Measures all rows in order. While a row runs, the process of the next row imports its libraries and waits.

    `known`: the GPU and the version of all rows with `pretend`. The process of a row may die or be stopped without a
    result; without `pretend` its row has the GPU and the version of the row before it.
    """
    began = time.monotonic()
    waiting: Process | None = None
    latest = {"gpu": "", "octavo": ""}  # of the rows without `pretend`, as references are
    try:
        for number, row in enumerate(rows):
            left = args.budget_s - (time.monotonic() - began)
            if left < min(args.limit_s, args.budget_s / 20):
                say(f"Time budget used up: {len(rows) - number} rows are omitted, starting with {row.method}.")
                break
            process, waiting = waiting or Process(row, args.alloc), None
            if not args.no_prefetch and number + 1 < len(rows):
                waiting = Process(rows[number + 1], args.alloc)
            result = process.result(min(args.limit_s, left))
            if row.pretend:
                result.update(known or {})
            else:
                latest = {name: result[name] or value for name, value in latest.items()}
                result.update(latest)
            if row.is_reference:
                loss = f"loss {result['first_loss']} {result['note']}"
                say(f"{row.method} {row.model} {row.batch} x {row.seq_len}: {loss}")
            elif left < args.limit_s and "stopped after" in result["note"]:
                say(f"Time budget used up: {row.method} was stopped and has no row.")
            else:
                write_row(result | {"commit": commit}, args.out)
    finally:
        if waiting:
            waiting.kill()


class Process:
    """A subprocess that measures one row, so that allocator, memory counters and crashes are isolated."""

    def __init__(self, row: Setting, alloc: str) -> None:
        variables = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
        if alloc:
            variables["PYTORCH_CUDA_ALLOC_CONF"] = alloc
        self.row = row
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (a pipe that nobody reads would fill up)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--wait", "--one", json.dumps(asdict(row))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment(variables),
            start_new_session=True,
        )  # fmt: skip

    def result(self, limit_s: float) -> dict[str, Any]:
        """Starts the measurement. If the process dies or reaches its time limit, the row has a note and no values."""
        try:
            output, _ = self.process.communicate(b"go\n", timeout=max(1.0, limit_s))
            result = last_row(output.decode(errors="replace"))
            note = f"died with exit status {self.process.returncode}"
        except subprocess.TimeoutExpired:
            result, note = None, f"stopped after {limit_s:.0f} s"
        self.kill()
        if result is None:
            result = blank(self.row) | {"note": note}
        if result["note"]:
            self.errors.seek(0)
            sys.stderr.write(self.errors.read()[-3000:].decode(errors="replace") + "\n")
        return result

    def kill(self) -> None:
        """Kills the process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(more: dict[str, str]) -> dict[str, str]:
    """This process's environment with this checkout first in PYTHONPATH, and `more`."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def last_row(output: str) -> dict[str, Any] | None:
    """The last line that is a row; libraries may print other lines before it."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"date"'):
            row: dict[str, Any] = json.loads(line)
            return row
    return None


def write_row(row: dict[str, Any], path: Path) -> None:
    """Appends a row to the file and prints it."""
    table.append(path, row)
    say(" | ".join(table.line_of(row)))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def commit_of(folder: Path) -> str:
    """The commit, with a + for uncommitted changes; "" without git or a repository."""
    try:
        git = ["git", "-C", str(folder)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
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
    """Measures the job of the article: one epoch of `octavo finetune`, from text files to a saved adapter.

    `seconds` is the time of the command, loading included; memory is the peak in its JSON output; tokens per second are
    the tokens of all steps over `seconds`. The note has the number of bytes and tokens of the text.
    """
    texts = sum(file.stat().st_size for file in text_dir.rglob("*") if file.is_file())
    row = blank(Setting("octavo finetune", model, batch, seq_len, steps=0, warmup=0))
    row["note"] = f"one epoch over {texts / 1e6:.2f} MB of text"
    options = ["--model", str(model_dir), "--data", str(text_dir), "--test-fraction", "0", "--epochs", "1"]
    options += ["--batch-size", str(batch), "--seq-len", str(seq_len), "--no-probes", *extra]
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
        output = json.loads(ran.stdout)
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    tokens = sum(event["tokens"] for event in steps)
    row["note"] += f", {tokens:,} tokens"
    row.update(seconds=round(seconds, 1), steps=output["steps"], first_loss=round(steps[0]["loss"], 6))
    row.update(tokens_per_second=round(tokens / seconds, 1), **job_memory(output["peak_memory_bytes"]))
    return row


def job_memory(peak_bytes: int) -> dict[str, float]:
    """The JSON output has one peak of loading and training: PyTorch's reserved memory on a GPU, RAM on a CPU."""
    peak = round(peak_bytes / GIB, 3)
    return {"peak_reserved_gib": peak, "load_reserved_gib": peak}


def gpu_and_version(pretend: str | None = None) -> dict[str, str]:
    """The GPU, as in the rows of `pretend`, and octavo's version; SystemExit if the GPU cannot run as `pretend`.

    From a subprocess: this process does not initialize CUDA.
    """
    command = [sys.executable, "-c", GPU_AND_VERSION, *([pretend] if pretend else [])]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment({}))
    if ran.returncode and pretend:
        raise SystemExit(ran.stderr.strip()[-2000:])
    result: dict[str, str] = json.loads(ran.stdout.strip().splitlines()[-1]) if ran.returncode == 0 else {}
    return result


if __name__ == "__main__":
    main()
