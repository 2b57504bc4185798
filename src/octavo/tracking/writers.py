"""The trackers: one class each, with the calls of its library. A library is imported when its class is made.

Each call may raise any error, which the caller handles. A number that is sent has the step of the run; sending the
same point again changes nothing, or replaces it.
"""

from __future__ import annotations

import html
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from octavo.tracking.points import Point

PROJECT = "octavo"  # where the tracker's own variable names none
MLFLOW_PARAMETERS = 100  # of a request
MLFLOW_CHARACTERS = 500  # of a parameter's value, in every version


@dataclass(frozen=True)
class Start:
    """What a tracker starts with: the run folder, all settings, its own id of a resumed run, and the steps done."""

    folder: Path
    settings: dict[str, Any]
    id: str | None
    done: int

    @property
    def name(self) -> str:
        """The name of the run, which people read."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """One run in a tracker."""

    name: str  # of --track and of the extra
    module: str
    rewinds: bool  # drops the points after the step at which a resumed run starts
    hint: str  # for an error at the start

    def __init__(self, start: Start) -> None: ...
    @property
    def id(self) -> str: ...
    @property
    def where(self) -> str: ...
    def send(self, point: Point) -> None: ...
    def close(self, *, finished: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, by PyTorch's SummaryWriter. Numbers are stored as float32."""

    name, module, rewinds, hint = "tensorboard", "tensorboard", True, ""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = start.folder / "tensorboard"
        self.id, self.where = "tensorboard", str(folder)
        # TensorBoard ignores what earlier files have from this step on.
        purge = start.done + 1 if start.id is not None else None
        self._writer = cast(Any, SummaryWriter(str(folder), purge_step=purge))
        for summary in hparams(flat(start.settings), {}):
            self._writer.file_writer.add_summary(summary)

    def send(self, point: Point) -> None:
        for name, value in point.numbers.items():
            self._writer.add_scalar(name, value, point.step, walltime=point.time)
        for name, text in point.texts.items():
            self._writer.add_text(name, f"```\n{text}\n```", point.step, walltime=point.time)
        self._writer.flush()  # so that a killed process loses no point

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE, WANDB_BASE_URL and the login of `wandb login` apply."""

    name, module, rewinds = "wandb", "wandb", False
    hint = "`wandb login` stores a key; WANDB_MODE=offline needs none."

    def __init__(self, start: Start) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", start.name),
            id=start.id or uuid.uuid4().hex[:8],
            resume="allow",
            dir=str(start.folder),
            config=flat(start.settings),
            allow_val_change=True,
            save_code=False,
            # Without a key it would ask for one on a terminal.
            settings=wandb.Settings(disable_git=True, console="off", silent=True, x_disable_stats=True),
        )
        self.id = str(self._run.id)
        self.where = str(self._run.url or self._run.dir)
        # Its own step only grows, so that points of a resumed run would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def send(self, point: Point) -> None:
        texts = {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in point.texts.items()}
        self._run.log({**point.numbers, **texts, "step": point.step})
        if "verdict" in point.texts:
            self._run.summary["verdict_text"] = point.texts["verdict"]

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; without them its file mlflow.db here."""

    name, module, rewinds = "mlflow", "mlflow", False
    hint = "Check MLFLOW_TRACKING_URI."

    def __init__(self, start: Start) -> None:
        import mlflow
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self.where = str(mlflow.get_tracking_uri())
        if start.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.id = str(self._client.create_run(number, run_name=start.name).info.run_id)
        else:
            self.id = start.id
            self._client.update_run(self.id, status="RUNNING")
        self._log_settings(flat(start.settings))

    def _log_settings(self, settings: Mapping[str, Any]) -> None:
        """Settings as parameters. MLflow refuses to change one: a resumed run has the new value as a tag."""
        from mlflow.entities import Param, RunTag

        values = {name: str(value)[:MLFLOW_CHARACTERS] for name, value in settings.items()}
        known = self._client.get_run(self.id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for at in range(0, len(new), MLFLOW_PARAMETERS):
            self._client.log_batch(self.id, params=new[at : at + MLFLOW_PARAMETERS])
        changed = [
            RunTag(f"resumed.{name}", value) for name, value in values.items() if known.get(name, value) != value
        ]
        if changed:
            self._client.log_batch(self.id, tags=changed)

    def send(self, point: Point) -> None:
        from mlflow.entities import Metric

        # Equal key, value, time and step are one row in its store: a point that is sent again is no second one.
        time = round(1000 * point.time)
        numbers = [Metric(name, value, time, point.step) for name, value in point.numbers.items()]
        if numbers:
            self._client.log_batch(self.id, metrics=numbers, synchronous=True)
        for name, text in point.texts.items():
            self._client.set_tag(self.id, name, text[:MLFLOW_CHARACTERS])
            self._client.log_text(self.id, text, f"{name}/step-{point.step}.txt")

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Trackio:
    """trackio, in its local database. TRACKIO_DIR, TRACKIO_PROJECT and TRACKIO_SPACE_ID apply."""

    name, module, rewinds = "trackio", "trackio", False
    hint = "Check TRACKIO_SPACE_ID and HF_TOKEN, if they are set."

    def __init__(self, start: Start) -> None:
        import trackio

        self._trackio = trackio
        self.id = start.id or f"{start.name}-{uuid.uuid4().hex[:8]}"  # it knows a run by its name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(
            project=project, name=self.id, config=flat(start.settings), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self.where = f"project {project}"

    def send(self, point: Point) -> None:
        texts = {name: self._trackio.Markdown(f"```\n{text}\n```") for name, text in point.texts.items()}
        self._run.log({**point.numbers, **texts}, step=point.step)

    def close(self, *, finished: bool) -> None:
        with quiet():
            self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip


def flat(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as single values: lists become text, and options that are not set are left out."""
    return {
        name: value if isinstance(value, bool | int | float | str) else ", ".join(map(str, value))
        if isinstance(value, list | tuple) else str(value)
        for name, value in settings.items() if value is not None
    }  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Sends what a library prints to stderr: stdout has the results."""
    with redirect_stdout(sys.stderr):
        yield
