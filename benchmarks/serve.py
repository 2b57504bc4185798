"""Many streams at once against a real server: `python benchmarks/serve.py [--streams 64] [--seconds 60]`.

Starts `octavo serve` in a process of its own, asks every prompt once alone (the reference for text and speed), then
keeps so many streams open for so long, each asking one prompt after another. Every answer must be, to the letter, the
one that the prompt got alone. Prints one JSON line: tokens per second of both, time to the first token and between
tokens (p50, p99), errors, wrong and lost answers, and the server's resident memory at the start and at most.

Greedy answers are compared, so the compute type is float32: in shorter types a product over 64 rows may round otherwise
than one over a single row, and a tie between two tokens may fall the other way.
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
    """What the streams saw. Times in seconds."""

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
    add("--prompts", type=int, default=16, help="different prompts")
    add("--max-tokens", type=int, default=32)
    add("--slots", type=int, default=32)
    add("--dtype", default="float32")
    add("--server", nargs=argparse.REMAINDER, default=[], help="last: more options for `octavo serve`")
    asked = parser.parse_args()
    sys.stdout.write(json.dumps(asyncio.run(run(asked))) + "\n")


async def run(asked: argparse.Namespace) -> dict[str, Any]:
    """The whole measurement."""
    port = free_port()
    command = [
        sys.executable, "-m", "octavo", "serve", "--model", asked.model, "--port", str(port), "--dtype", asked.dtype,
        "--slots", str(asked.slots), "--queue", str(2 * asked.streams), *asked.server,
    ]  # fmt: skip
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        limits = httpx.Limits(max_connections=asked.streams + 4)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits, trust_env=False,  # no proxy in between
        ) as client:  # fmt: skip
            await ready(client, server)
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            words = TEXT.split()
            prompts = [" ".join(words[i % 7 : i % 7 + 3 + i % 9]) + f" {i}" for i in range(asked.prompts)]
            alone, reference = Measured(), {}
            began = time.perf_counter()
            for prompt in prompts:
                reference[prompt] = await answer(client, model, prompt, asked.max_tokens, alone)
            alone_speed = alone.tokens / (time.perf_counter() - began)
            start_bytes = peak = resident_bytes(server.pid)
            told, began = Measured(), time.perf_counter()
            streams = [
                asyncio.create_task(stream(client, model, prompts[i:] + prompts[:i], asked, reference, told, began))
                for i in (n % len(prompts) for n in range(asked.streams))
            ]
            while not all(task.done() for task in streams):
                peak = max(peak, resident_bytes(server.pid))
                await asyncio.sleep(0.2)
            spent = time.perf_counter() - began
            metrics = (await client.get("/metrics")).text
    finally:
        server.terminate()
        server.wait(30)
    speed = told.tokens / spent
    return {
        "model": asked.model, "streams": asked.streams, "slots": asked.slots, "seconds": round(spent, 1),
        "answers": told.answers, "wrong": len(told.wrong), "errors": len(told.errors),
        "tokens_per_second": round(speed, 1), "one_at_a_time": round(alone_speed, 1),
        "ratio": round(speed / alone_speed, 2),
        **spread("first_token_s", told.first), **spread("between_s", told.between),
        "resident_start_mib": start_bytes >> 20, "resident_peak_mib": peak >> 20,
        "running_after": [line for line in metrics.splitlines() if "running" in line and not line.startswith("#")],
        "first_errors": (told.errors + told.wrong)[:3], "command": " ".join(command[1:]),
    }  # fmt: skip


async def stream(
    client: httpx.AsyncClient, model: str, prompts: list[str], asked: argparse.Namespace,
    reference: dict[str, str], told: Measured, began: float,
) -> None:  # fmt: skip
    """One user: the next prompt as soon as the answer is there, until the time is over."""
    number = 0
    while time.perf_counter() - began < asked.seconds:
        prompt = prompts[number % len(prompts)]
        number += 1
        try:
            got = await answer(client, model, prompt, asked.max_tokens, told)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            told.errors.append(repr(error)[:200])
            continue
        told.answers += 1
        if got != reference[prompt]:
            told.wrong.append(f"{prompt!r}: {got!r} instead of {reference[prompt]!r}")


async def answer(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, told: Measured) -> str:
    """The text of one streamed completion; its times go into `told`."""
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
                (told.between if text or last != began else told.first).append(now - last)
                last = now
                text += choice["text"]
    if not done or usage is None:
        raise ValueError("the stream ended early")
    told.tokens += usage
    return text


async def ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    """Waits until the server says that it is ready."""
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


def spread(name: str, seconds: list[float]) -> dict[str, float]:
    """p50 and p99."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100)
    return {f"{name}_p50": round(cuts[49], 4), f"{name}_p99": round(cuts[98], 4)}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
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
