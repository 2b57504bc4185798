"""What the libraries of the trackers read back of a run: numbers as (name, step, value), and texts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 2**15  # bytes
Read = tuple[list[tuple[str, int, float]], list[str]]


def tensorboard(out: Path, run_id: str) -> Read:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    files = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    files.Reload()
    numbers = [(tag, one.step, one.value) for tag in files.Tags()["scalars"] for one in files.Scalars(tag)]
    texts = [
        item.decode()
        for tag in files.Tags()["tensors"]
        for one in files.Tensors(tag)
        for item in tensor_util.make_ndarray(one.tensor_proto).ravel()
        if isinstance(item, bytes)
    ]
    return numbers, texts


def mlflow(out: Path, run_id: str) -> Read:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["rank"] == "2"
    numbers = [
        (name, one.step, one.value) for name in run.data.metrics for one in client.get_metric_history(run_id, name)
    ]
    folder = Path(client.download_artifacts(run_id, ""))
    return numbers, [file.read_text() for file in folder.rglob("*.txt")]


def trackio(out: Path, run_id: str) -> Read:
    from trackio.sqlite_storage import SQLiteStorage

    numbers, texts = [], []
    for row in SQLiteStorage.get_logs("octavo", run_id):
        for name, value in row.items():
            if name in ("step", "timestamp"):
                continue
            if isinstance(value, int | float):
                numbers.append((name, row["step"], float(value)))
            else:
                texts.append(str(value))
    return numbers, texts


def wandb(out: Path, run_id: str) -> Read:
    """From the files of offline mode, which `wandb sync` uploads."""
    from wandb.proto import wandb_internal_pb2 as proto

    numbers: list[tuple[str, int, float]] = []
    texts: list[str] = []
    files = sorted((out / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2  # one a call, of the same run
    for path in files:
        for data in _records(path.read_bytes()):
            record = proto.Record()
            record.ParseFromString(data)
            values: dict[str, Any] = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
                if len(item.nested_key) < 2  # those are the parts of a text's description
            }
            step = values.pop("step", None)
            numbers += [
                (name, step, value)
                for name, value in values.items()
                if isinstance(value, int | float) and not name.startswith("_")
            ]
        texts += [file.read_text() for file in path.parent.rglob("*.html")]
    return numbers, texts


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: LevelDB's log format (blocks of 32 KiB, a record in one or more parts)."""
    position, record = 7, b""  # after the file's header
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        length, part = struct.unpack("<HB", data[position + 4 : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


READERS: dict[str, Callable[[Path, str], Read]] = {
    "tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio,
}  # fmt: skip
