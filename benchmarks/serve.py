"""Measures `octavo serve` with concurrent streams: `python benchmarks/serve.py [--streams 64] [--seconds 60]`.

Starts `octavo serve` in a subprocess and sends every prompt once alone, as reference of text and speed. Then
`--streams` clients send one prompt after another for `--seconds`. Every answer must equal the reference of its prompt
exactly. Prints one JSON line: tokens per second of both phases, time to the first token and between tokens (p50, p99),
errors, wrong answers, and the server's resident memory at the start and at its peak.

The default dtype is float32: in 16 bits a matmul over 64 rows may round differently from one over a single row, and
greedy decoding may then pick another token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
TEXT = "the king of storm and sea rode out one winter morning to find a quiet harbour for his weary ships"


@dataclass
class Measured:
    """Measurements of the streams; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--streams", type=int, default=64)
    add("--seconds", type=float, default=60.0)
    add("--prompts", type=int, default=16, help="number of different prompts")
    add("--max-tokens", type=int, default=32)
    add("--slots", type=int, default=32)
    add("--dtype", default="float32")
    add(
        "--server",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of `octavo serve`; must be last",
    )
    args = parser.parse_args()
    sys.stdout.write(json.dumps(asyncio.run(run(args))) + "\n")


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Starts the server and measures both phases."""
    port = free_port()
    command = [
        sys.executable, "-m", "octavo", "serve", "--model", args.model, "--port", str(port), "--dtype", args.dtype,
        "--slots", str(args.slots), "--queue", str(2 * args.streams), *args.server,
    ]  # fmt: skip
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        limits = httpx.Limits(max_connections=args.streams + 4)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits, trust_env=False,  # no proxy
        ) as client:  # fmt: skip
            await ready(client, server)
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            words = TEXT.split()
            prompts = [" ".join(words[i % 7 : i % 7 + 3 + i % 9]) + f" {i}" for i in range(args.prompts)]
            alone, reference = Measured(), {}
            began = time.perf_counter()
            for prompt in prompts:
                reference[prompt] = await answer(client, model, prompt, args.max_tokens, alone)
            alone_speed = alone.tokens / (time.perf_counter() - began)
            start_bytes = peak = resident_bytes(server.pid)
            concurrent, began = Measured(), time.perf_counter()
            streams = [
                asyncio.create_task(
                    stream(client, model, prompts[i:] + prompts[:i], args, reference, concurrent, began)
                )
                for i in (n % len(prompts) for n in range(args.streams))
            ]
            while not all(task.done() for task in streams):
                peak = max(peak, resident_bytes(server.pid))
                await asyncio.sleep(0.2)
            spent = time.perf_counter() - began
            metrics = (await client.get("/metrics")).text
    finally:
        server.terminate()
        server.wait(30)
    speed = concurrent.tokens / spent
    return {
        "model": args.model, "streams": args.streams, "slots": args.slots, "seconds": round(spent, 1),
        "answers": concurrent.answers, "wrong": len(concurrent.wrong), "errors": len(concurrent.errors),
        "tokens_per_second": round(speed, 1), "one_at_a_time": round(alone_speed, 1),
        "ratio": round(speed / alone_speed, 2),
        **percentiles("first_token_s", concurrent.first), **percentiles("between_s", concurrent.between),
        "resident_start_mib": start_bytes >> 20, "resident_peak_mib": peak >> 20,
        "running_after": [line for line in metrics.splitlines() if "running" in line and not line.startswith("#")],
        "first_errors": (concurrent.errors + concurrent.wrong)[:3], "command": " ".join(command[1:]),
    }  # fmt: skip


async def stream(
    client: httpx.AsyncClient, model: str, prompts: list[str], args: argparse.Namespace,
    reference: dict[str, str], measured: Measured, began: float,
) -> None:  # fmt: skip
    """One client: sends the next prompt after each answer, until `--seconds` have passed."""
    number = 0
    while time.perf_counter() - began < args.seconds:
        prompt = prompts[number % len(prompts)]
        number += 1
        try:
            actual = await answer(client, model, prompt, args.max_tokens, measured)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            measured.errors.append(repr(error)[:200])
            continue
        measured.answers += 1
        if actual != reference[prompt]:
            measured.wrong.append(f"{prompt!r}: {actual!r} instead of {reference[prompt]!r}")


async def answer(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, measured: Measured) -> str:
    """The text of one streamed completion; adds its times to `measured`."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began = last = time.perf_counter()
    text, usage, done = "", None, False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            event = json.loads(line[6:])
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                now = time.perf_counter()
                (measured.between if text or last != began else measured.first).append(now - last)
                last = now
                text += choice["text"]
    if not done or usage is None:
        raise ValueError("the stream ended early")
    measured.tokens += usage
    return text


async def ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    """Waits until GET /ready answers 200."""
    for _ in range(1200):
        if server.poll() is not None:
            assert server.stderr is not None
            raise SystemExit(f"the server ended: {server.stderr.read().decode()[-2000:]}")
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.25)
    raise SystemExit("the server is not ready after 5 minutes")


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    """p50 and p99 of the times."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{name}_p50": round(cuts[49], 4), f"{name}_p99": round(cuts[98], 4)}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
