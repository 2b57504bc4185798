"""Modules with the calls of wandb, mlflow and trackio that octavo makes, under the signatures of the real ones.

Signatures: wandb 0.31, mlflow 3.17, trackio 0.43. An argument that the real function lacks is a TypeError here too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class FakeRun:
    """What one run of a tracker got."""

    settings: dict[str, Any] = field(default_factory=dict)
    numbers: list[tuple[str, int, float]] = field(default_factory=list)
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    ended: list[bool] = field(default_factory=list)  # of each call: whether the run finished


@dataclass
class Store:
    """All runs of a tracker. Sending fails with `error` after so many calls."""

    runs: dict[str, FakeRun] = field(default_factory=dict)
    fails_after: int | None = None
    error: str = ""
    start_error: str = ""
    calls: int = 0

    def check(self) -> None:
        self.calls += 1
        if self.fails_after is not None and self.calls > self.fails_after:
            raise ConnectionError(self.error)


@dataclass
class Text:
    """A text as the libraries wrap it."""

    text: str


def wandb(store: Store) -> dict[str, ModuleType]:
    class Run:
        def __init__(self, key: str) -> None:
            self.id, self.url, self.dir, self.summary = key, None, "wandb/offline", dict[str, Any]()
            self.kept, self.last_step = store.runs[key], -1

        def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            store.check()
            at = data["step"]
            for name, value in data.items():
                if isinstance(value, Text):
                    self.kept.texts.append((name, at, value.text))
                elif name != "step":
                    self.kept.numbers.append((name, at, value))

        def finish(self, exit_code: int | None = None) -> None:
            self.kept.ended.append(exit_code == 0)

    def init(
        *, project: str | None = None, name: str | None = None, id: str | None = None, resume: str | None = None,
        dir: str | None = None, config: dict[str, Any] | None = None, allow_val_change: bool | None = None,
        save_code: bool | None = None, settings: Any = None,
    ) -> Run:  # fmt: skip
        if store.start_error:
            raise RuntimeError(store.start_error)
        assert id is not None
        store.runs.setdefault(id, FakeRun(settings=config or {}))
        return Run(id)

    return {"wandb": _module("wandb", init=init, Html=Text, Settings=SimpleNamespace)}


def trackio(store: Store) -> dict[str, ModuleType]:
    class Run:
        def __init__(self, name: str) -> None:
            self.kept = store.runs[name]

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            store.check()
            for name, value in metrics.items():
                row = self.kept.texts if isinstance(value, Text) else self.kept.numbers
                row.append((name, step, value.text if isinstance(value, Text) else value))  # type: ignore[arg-type]

        def finish(self) -> None:
            self.kept.ended.append(bool(self.kept.ended))  # it is not told how a run ended

    def init(
        project: str, name: str | None = None, config: dict[str, Any] | None = None, resume: str = "never",
        embed: bool = True, auto_log_gpu: bool | None = None, auto_log_cpu: bool | None = None,
    ) -> Run:  # fmt: skip
        assert name
        store.runs.setdefault(name, FakeRun(settings=config or {}))
        return Run(name)

    return {"trackio": _module("trackio", init=init, Markdown=Text)}


def mlflow(store: Store) -> dict[str, ModuleType]:
    @dataclass
    class Metric:
        key: str
        value: float
        timestamp: int
        step: int

    @dataclass
    class Param:
        key: str
        value: str

    class Client:
        def __init__(self, tracking_uri: str | None = None) -> None: ...

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            return "1"

        def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
            key = f"run{len(store.runs)}"
            store.runs[key] = FakeRun()
            return SimpleNamespace(info=SimpleNamespace(run_id=key))

        def get_run(self, run_id: str) -> Any:
            return SimpleNamespace(data=SimpleNamespace(params=store.runs[run_id].settings))

        def update_run(self, run_id: str, status: str | None = None) -> None: ...

        def log_batch(
            self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: bool | None = None
        ) -> None:
            if metrics:
                store.check()
            run = store.runs[run_id]
            for one in params:
                if run.settings.setdefault(one.key, one.value) != one.value:
                    raise ValueError("Changing param values is not allowed")
            assert len(params) <= 100
            run.numbers += [(one.key, one.step, one.value) for one in metrics]
            run.tags |= {one.key: one.value for one in tags}

        def set_tag(self, run_id: str, key: str, value: Any) -> None:
            store.runs[run_id].tags[key] = value

        def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
            name, _, file = artifact_file.rpartition("/step-")
            store.runs[run_id].texts.append((name, int(file.removesuffix(".txt")), text))

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            store.runs[run_id].ended.append(status == "FINISHED")

    return {
        "mlflow": _module("mlflow", get_tracking_uri=lambda: "sqlite:///mlflow.db"),
        "mlflow.tracking": _module("mlflow.tracking", MlflowClient=Client),
        "mlflow.entities": _module("mlflow.entities", Metric=Metric, Param=Param, RunTag=Param),
    }


MODULES = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def install(name: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Puts the fake module of a tracker in the place of the real one. Returns what it stores."""
    store = Store()
    for module, content in MODULES[name](store).items():
        monkeypatch.setitem(sys.modules, module, content)
    return store


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    return module
