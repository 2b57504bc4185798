"""Trains and serves a small model as on other GPUs (`--pretend`), and compares with the GPU that is there.

    python benchmarks/restricted.py --gpus T4,P100,1080Ti,RTX5000,A6000,3060,4090 [--model smollm2] [--steps 300]

Trains on src/octavo/shakespeare once without a restriction and once as on each GPU, with the same seed, and evaluates
on the held-out play. Then serves the adapter of the unrestricted run, in float32 and as on each GPU, and compares
greedy answers. Prints two JSON lines for each GPU: held-out loss, its relative difference and peak memory; equal
answers and tokens. A GPU "cpu" runs on the CPU without a restriction, to test this script.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "src" / "octavo" / "shakespeare"
PROMPTS = (
    "HAMLET.", "To be, or not to be", "Enter the King and", "What news from the", "My lord, I have", "The Queen,",
    "O, that this too", "Good night, sweet",
)  # fmt: skip
READY_S = 300  # time limit of a server's start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", default="T4,P100,1080Ti,RTX5000,A6000,3060,4090", help="names of --pretend, separated by commas")
    add("--model", default="smollm2")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=8)
    add("--seq-len", type=int, default=512)
    add("--jobs", type=int, default=1, help="GPUs that are compared at the same time")
    add("--max-tokens", type=int, default=24, help="of an answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unrestricted = trained(args, Path(folder) / "unrestricted", [])
        adapter = Path(folder) / "unrestricted"
        expected = answers(args, adapter, ["--dtype", "float32"])
        say({"gpu": "unrestricted", **unrestricted})

        def compared(gpu: str) -> None:
            options = ["--device", "cpu"] if gpu == "cpu" else ["--pretend", gpu]
            result = trained(args, Path(folder) / gpu, options)
            say({"gpu": gpu, **result, "loss_difference": round(result["loss"] / unrestricted["loss"] - 1, 6)})
            say({"gpu": gpu, **agreement(expected, answers(args, adapter, options))})

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(compared, args.gpus.split(",")))


def trained(args: argparse.Namespace, out: Path, options: list[str]) -> dict[str, Any]:
    """Fine-tunes into `out`: held-out loss, of the base model too, in nats a token; peak memory in GiB; seconds."""
    began = time.perf_counter()
    output = octavo(
        "finetune", "--model", args.model, "--scheme", "int8", "--data", str(TEXTS / "train"), "--test-data",
        str(TEXTS / "test"), "--steps", str(args.steps), "--batch-size", str(args.batch_size), "--seq-len",
        str(args.seq_len), "--lr", "1e-3", "--no-probes", "--out", str(out), *options,
    )  # fmt: skip
    losses = {row["name"]: row["loss"] for row in output["rows"]}
    return {
        "loss": losses["tuned"],
        "base_loss": losses["quantized base"],
        "peak_gib": round(output["peak_memory_bytes"] / 2**30, 3),
        "seconds": round(time.perf_counter() - began, 1),
    }


def octavo(command: str, *options: str) -> dict[str, Any]:
    """The JSON output of a command; SystemExit with its errors."""
    ran = subprocess.run(
        [sys.executable, "-m", "octavo", command, *options, "--json"], capture_output=True, text=True, env=environment()
    )
    if ran.returncode:
        raise SystemExit(f"octavo {command} {' '.join(options)}: {ran.stderr[-2000:]}{ran.stdout[-1000:]}")
    output: dict[str, Any] = json.loads(ran.stdout)
    return output


def answers(args: argparse.Namespace, adapter: Path, options: list[str]) -> list[list[int]]:
    """The token ids of the greedy answers of `octavo serve` to PROMPTS, one after another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "octavo", "serve", "--model", args.model, "--adapter", f"tuned={adapter}", "--port",
         str(port), *options],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until_ready(server, port)
        found = []
        for prompt in PROMPTS:
            body = {"model": "tuned", "prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0}
            text = get(port, "/v1/completions", body)["choices"][0]["text"]
            found.append(get(port, "/tokenize", {"model": "tuned", "prompt": text})["tokens"])
        return found
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server: subprocess.Popen[str], port: int) -> None:
    """Returns when the server answers; SystemExit with its errors if it ends or does not within READY_S."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            get(port, "/ready")
            return
        except (URLError, ConnectionError, HTTPError):
            time.sleep(0.2)
    server.kill()
    assert server.stderr is not None
    raise SystemExit(f"octavo serve did not start: {server.stderr.read()[-2000:]}")


def get(port: int, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON answer of a route; a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{port}{route}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        text = response.read().decode()
    answer: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
    return answer


def agreement(expected: list[list[int]], given: list[list[int]]) -> dict[str, Any]:
    """How many answers are equal, and how many tokens are before the first difference of an answer."""
    same = 0
    for one, other in zip(expected, given, strict=True):
        differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        same += next(differing, min(len(one), len(other)))
    return {
        "equal_answers": sum(a == b for a, b in zip(expected, given, strict=True)), "answers": len(expected),
        "equal_tokens": same, "tokens": sum(map(len, expected)),
    }  # fmt: skip


def environment() -> dict[str, str]:
    """This process's environment with this checkout first in PYTHONPATH."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
