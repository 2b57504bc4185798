"""Counts of the server and the engine as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from octavo.infer.requests import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: from a short answer on a card to the longest on two cores.
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STATS = {
    "slots": ("gauge", "Requests that can run at once."),
    "running": ("gauge", "Requests that run."),
    "waiting": ("gauge", "Requests that wait for a slot."),
    "queue_limit": ("gauge", "Requests that may wait."),
    "cache_tokens_total": ("gauge", "Positions in the key/value cache."),
    "cache_tokens_used": ("gauge", "Positions in the key/value cache that running requests take."),
    "requests_total": ("counter", "Requests that the engine took."),
    "finished_total": ("counter", "Requests that were answered in full."),
    "cancelled_total": ("counter", "Requests that were cancelled."),
    "failed_total": ("counter", "Requests that the engine failed at."),
    "prompt_tokens_total": ("counter", "Prompt tokens."),
    "reused_tokens_total": ("counter", "Prompt tokens that were found in the cache."),
    "generated_tokens_total": ("counter", "Tokens that were generated."),
    "steps_total": ("counter", "Steps of the engine."),
}


class Histogram:
    """How often a duration fell under each of BOUNDS."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def lines(self, name: str, help_text: str) -> Iterator[str]:
        yield from _head(name, "histogram", help_text)
        sums = list(accumulate(self._counts))
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], sums, strict=True):
            yield _line(f"{name}_bucket", {"le": bound}, count)
        yield _line(f"{name}_sum", {}, self._seconds)
        yield _line(f"{name}_count", {}, sums[-1])


class Metrics:
    """What the server counts itself; touched from the event loop alone."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str, int]] = Counter()  # route, method, status
        self.gone = 0
        self.first_token = Histogram()
        self.whole_answer = Histogram()

    def lines(self, stats: Stats, hashes: Iterable[tuple[str, str]]) -> Iterator[str]:
        """All metrics; `hashes` are the served names, each with its fingerprint."""
        for field, (kind, help_text) in STATS.items():
            name = "octavo_cache_tokens" if field == "cache_tokens_total" else f"octavo_{field}"
            yield from _head(name, kind, help_text)
            yield _line(name, {}, getattr(stats, field))
        yield from _head("octavo_model_info", "gauge", "The names that are served.")
        for model, fingerprint in hashes:
            yield _line("octavo_model_info", {"model": model, "sha256": fingerprint}, 1)
        yield from _head("octavo_http_answers_total", "counter", "Answers by route and status.")
        for (route, method, status), count in sorted(self.answers.items()):
            yield _line("octavo_http_answers_total", {"route": route, "method": method, "status": str(status)}, count)
        yield from _head(
            "octavo_clients_gone_total", "counter", "Clients that went away before their answer was whole."
        )
        yield _line("octavo_clients_gone_total", {}, self.gone)
        yield from self.first_token.lines("octavo_first_token_seconds", "From a request to its first token.")
        yield from self.whole_answer.lines("octavo_answer_seconds", "From a request to the end of its answer.")

    def text(self, stats: Stats, hashes: Iterable[tuple[str, str]]) -> str:
        return "\n".join(self.lines(stats, hashes)) + "\n"


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
