"""Metrics of the server and the engine in Prometheus text format 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from octavo.infer.requests import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Bucket bounds in seconds: from a short generation on a GPU to the longest on two CPU cores.
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STATS = {
    "slots": ("gauge", "Maximum number of running requests."),
    "running": ("gauge", "Running requests."),
    "waiting": ("gauge", "Requests waiting for a slot."),
    "queue_limit": ("gauge", "Maximum number of waiting requests."),
    "cache_tokens_total": ("gauge", "Capacity of the KV cache in tokens."),
    "cache_tokens_used": ("gauge", "Tokens of running requests in the KV cache."),
    "requests_total": ("counter", "Requests accepted by the engine."),
    "finished_total": ("counter", "Requests finished."),
    "cancelled_total": ("counter", "Requests cancelled."),
    "failed_total": ("counter", "Requests failed in the engine."),
    "prompt_tokens_total": ("counter", "Prompt tokens."),
    "reused_tokens_total": ("counter", "Prompt tokens reused from the prefix cache."),
    "generated_tokens_total": ("counter", "Generated tokens."),
    "steps_total": ("counter", "Engine steps."),
}


class Histogram:
    """A Prometheus histogram of durations with the buckets BOUNDS."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def lines(self, name: str, help_text: str) -> Iterator[str]:
        yield from _head(name, "histogram", help_text)
        cumulative = list(accumulate(self._counts))
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], cumulative, strict=True):
            yield _line(f"{name}_bucket", {"le": bound}, count)
        yield _line(f"{name}_sum", {}, self._seconds)
        yield _line(f"{name}_count", {}, cumulative[-1])


class Metrics:
    """Counts of the HTTP server. Used from the event loop only, so there is no lock."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str, int]] = Counter()  # route, method, status
        self.disconnected = 0  # clients that disconnected before the end of their response
        self.time_to_first_token = Histogram()
        self.total_time = Histogram()

    def lines(self, stats: Stats, hashes: Iterable[tuple[str, str]]) -> Iterator[str]:
        """All metrics. `hashes` are pairs of a served model name and its fingerprint."""
        for field, (kind, help_text) in STATS.items():
            name = "octavo_cache_tokens" if field == "cache_tokens_total" else f"octavo_{field}"
            yield from _head(name, kind, help_text)
            yield _line(name, {}, getattr(stats, field))
        yield from _head("octavo_model_info", "gauge", "The served models.")
        for model, fingerprint in hashes:
            yield _line("octavo_model_info", {"model": model, "sha256": fingerprint}, 1)
        yield from _head("octavo_http_answers_total", "counter", "Responses by route, method and status.")
        for (route, method, status), count in sorted(self.responses.items()):
            yield _line("octavo_http_answers_total", {"route": route, "method": method, "status": str(status)}, count)
        yield from _head(
            "octavo_clients_gone_total", "counter", "Clients that disconnected before the end of their response."
        )
        yield _line("octavo_clients_gone_total", {}, self.disconnected)
        yield from self.time_to_first_token.lines("octavo_first_token_seconds", "Time to first token.")
        yield from self.total_time.lines("octavo_answer_seconds", "Time from a request to the end of its response.")

    def text(self, stats: Stats, hashes: Iterable[tuple[str, str]]) -> str:
        return "\n".join(self.lines(stats, hashes)) + "\n"


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    label_text = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{label_text}}} {value}" if label_text else f"{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
