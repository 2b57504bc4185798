"""Loading and unloading adapters at run time: allowed paths, errors, and requests that run meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.server.clients import PATIENCE, Client, run_scenario, until

from octavo.adapters import Adapter
from octavo.infer.requests import ServedAdapter
from octavo.runs import checkpoint
from octavo.runs.checkpoint import Contents
from octavo.runs.folder import RunFolder

OpenServer = Callable[..., Any]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def adapters_folder(tmp_path: Path) -> Path:
    """A folder with two adapters; a third adapter is outside it."""
    for name in ("adapters/hamlet", "adapters/plays/lear", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    return tmp_path / "adapters"


@pytest.fixture
def server(open_server: OpenServer, adapters_folder: Path) -> Any:
    return open_server(adapters_from=adapters_folder)


def names(server: Any) -> list[str]:
    return [model["id"] for model in server.client.get("/v1/models").json()["data"]]


def load(server: Any, name: str, path: str | Path) -> Any:
    return server.client.post(LOAD, json={"lora_name": name, "lora_path": str(path)})


def test_without_adapters_from_there_are_no_adapter_routes(open_server: OpenServer) -> None:
    server = open_server()
    refused = load(server, "hamlet", "hamlet")
    assert refused.status_code == 404
    assert "--adapters-from" in refused.json()["error"]["message"]
    assert server.client.post(UNLOAD, json={"lora_name": "king"}).status_code == 404
    assert not {LOAD, UNLOAD} & server.client.get("/openapi.json").json()["paths"].keys()
    assert names(server) == ["tiny", "king", "queen"]


def test_load_generate_and_unload(server: Any, adapters_folder: Path) -> None:
    response = load(server, "a/hamlet:1", "hamlet")
    sha256 = hashlib.sha256(b"adapters/hamlet").hexdigest()
    assert (response.status_code, response.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert response.text.startswith("Success")
    assert response.headers["X-System-Fingerprint"] == sha256
    assert names(server) == ["tiny", "king", "queen", "a/hamlet:1"]
    assert server.post("/v1/completions", model="a/hamlet:1", prompt="the")["system_fingerprint"] == sha256
    response = server.client.post(UNLOAD, json={"lora_name": "a/hamlet:1"})
    assert (response.status_code, response.text[:7]) == (200, "Success")
    assert names(server) == ["tiny", "king", "queen"]
    assert server.error("/v1/completions", model="a/hamlet:1", prompt="the")[0] == 404


@pytest.mark.parametrize("path", ["hamlet", "./hamlet/", "plays/lear", "link", "{root}/hamlet", "{other}/plays/lear"])
def test_paths_inside_the_folder_are_loaded(open_server: OpenServer, adapters_folder: Path, path: str) -> None:
    (adapters_folder / "link").symlink_to(adapters_folder / "hamlet")
    other = adapters_folder.parent / "other"
    other.symlink_to(adapters_folder)
    for root in (adapters_folder, other):
        server = open_server(adapters_from=root)
        path_in_request = path.format(root=adapters_folder, other=root)
        assert load(server, "hamlet", path_in_request).status_code == 200


@pytest.fixture
def run(adapters_folder: Path) -> Path:
    """A run with checkpoints of the steps 3 and 4, in the folder of adapters."""
    folder = RunFolder(adapters_folder / "run")
    folder.path.mkdir()
    folder.begin("steps: 5\n")
    for step in (3, 4):
        checkpoint.save(folder.checkpoints, step, Contents({}, {"step": step}, {"adapter": partial(fill, step)}))
    return folder.path


def fill(step: int, folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"step %d" % step)


def loaded_step(server: Any, name: str, path: str) -> Any:
    response = load(server, name, path)
    assert response.status_code == 200, response.text
    contents = [f"step {step}" for step in range(1, 5)]
    hashes = [hashlib.sha256(content.encode()).hexdigest() for content in contents]
    return contents[hashes.index(server.engine.loaded[name].sha256)]


def test_runs_and_their_checkpoints_are_loaded(server: Any, run: Path) -> None:
    assert loaded_step(server, "new", "run") == "step 4"
    assert loaded_step(server, "third", "run@3") == "step 3"
    assert loaded_step(server, "fourth", f"{run}@4") == "step 4"
    (run / "adapter").mkdir()
    fill(1, run / "adapter")
    assert loaded_step(server, "kept", "run") == "step 1"


def test_a_step_without_a_checkpoint_is_rejected_with_the_steps(server: Any, run: Path) -> None:
    status, error = server.error(LOAD, lora_name="new", lora_path="run@7")
    assert (status, error["code"], error["param"]) == (400, "adapter_refused", "lora_path")
    assert error["message"].startswith(
        "The run run has no checkpoint of step 7. The run has checkpoints of the steps 3, 4."
    )
    assert server.error(LOAD, lora_name="new", lora_path="walk@3")[0] == 404


FILE_3, FILE_4 = (f"checkpoints/step-0000000{step}/adapter/adapter_model.safetensors" for step in (3, 4))
PARTS = [(path, part) for path in ("run", "run@3") for part in ("adapter", "checkpoints", FILE_3[:25], "run.json")]


@pytest.mark.parametrize(("path", "part"), [*PARTS, ("run", FILE_4), ("run@3", FILE_3)])
def test_parts_of_a_run_outside_the_folder_are_rejected(path: str, part: str, server: Any, run: Path) -> None:
    outside = run.parent.parent / "outside"
    if (run / part).exists():
        (run / part).rename(outside / "part")
    (run / part).symlink_to(outside / "part")
    status, error = server.error(LOAD, lora_name="new", lora_path=path)
    assert (status, error["message"][:40]) == (400, "`lora_path` is not inside the folder fro")


OUTSIDE = [
    "..", ".", "../outside", "hamlet/../../outside", "hamlet/..", "../adapters/hamlet", "/", "/etc", "/nowhere",
    "{outside}", "{root}", "{root}/../outside", "{root}2", "out", "out/deeper", "dangling", "circle", "hamlet/\0",
    "out@3", "{outside}@3", "{root}@3",
    "files", "q" * 300, "hamlet/" * 140,
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_outside_the_folder_are_rejected_without_details(server: Any, adapters_folder: Path, path: str) -> None:
    outside = adapters_folder.parent / "outside"
    (adapters_folder / "out").symlink_to(outside)
    (adapters_folder / "dangling").symlink_to(adapters_folder.parent / "missing")
    (adapters_folder / "circle").symlink_to(adapters_folder / "circle")
    (adapters_folder / "files").mkdir()
    (adapters_folder / "files" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    status, error = server.error(LOAD, lora_name="new", lora_path=path.format(root=adapters_folder, outside=outside))
    assert (status, error["param"]) in ((400, "lora_path"), (404, "lora_path"))
    assert error["message"].startswith("`lora_path` is not inside the folder") or path in ("q" * 300, "hamlet/" * 140)
    assert str(adapters_folder.parent) not in error["message"]
    assert "new" not in server.engine.loaded


def test_a_link_outside_the_folder_does_not_change_the_error(server: Any, adapters_folder: Path) -> None:
    """`..` is not resolved through links outside the folder: the error would reveal whether they exist."""
    before = server.error(LOAD, lora_name="new", lora_path="../door/../adapters/hamlet")
    (adapters_folder.parent / "door").symlink_to("/")
    assert server.error(LOAD, lora_name="new", lora_path="../door/../adapters/hamlet") == before


def test_a_missing_folder_is_404(server: Any) -> None:
    status, error = server.error(LOAD, lora_name="new", lora_path="macbeth")
    assert (status, error["param"], error["type"]) == (404, "lora_path", "not_found_error")
    assert server.error(LOAD, lora_name="new", lora_path="hamlet/adapter_model.safetensors")[0] == 404
    for path in ("..@3", "hamlet/..@3"):  # names of folders, and not of the parent at a step
        assert server.error(LOAD, lora_name="new", lora_path=path)[0] == 404
    for path in ("@3", "hamlet/@3"):  # the folder before @ is outside, and no run
        assert server.error(LOAD, lora_name="new", lora_path=path)[0] == 400


def test_an_adapter_that_does_not_match_is_rejected_with_the_reason(server: Any, adapters_folder: Path) -> None:
    server.engine.read_errors["hamlet"] = "has no place for layers.7"
    status, error = server.error(LOAD, lora_name="new", lora_path="hamlet")
    assert (status, error["code"]) == (400, "adapter_refused")
    assert error["message"] == "The adapter in hamlet has no place for layers.7. Give another one."
    assert names(server) == ["tiny", "king", "queen"]


@pytest.mark.parametrize("error", [IndexError("x"), TypeError("x"), OSError("x"), RecursionError()])
def test_corrupt_files_are_400(server: Any, error: Exception) -> None:
    server.engine.read_errors["hamlet"] = error
    status, response_error = server.error(LOAD, lora_name="new", lora_path="hamlet")
    assert (status, response_error["code"], response_error["message"]) == (
        400,
        "adapter_refused",
        "The adapter's files are corrupt.",
    )


def test_an_adapter_of_a_different_base_is_served_with_a_warning(server: Any, adapters_folder: Path) -> None:
    for number, (base, expected) in enumerate(((server.engine.base_sha256, False), ("other", True), (None, False))):
        (adapters_folder / "hamlet" / "octavo.json").write_text(json.dumps({"base": {"sha256": base}}))
        response = load(server, f"a{number}", "hamlet")
        assert response.status_code == 200
        assert ("different base weights" in response.text) is expected


def test_a_name_in_use_is_rejected(server: Any) -> None:
    for name in ("king", "tiny"):
        status, error = server.error(LOAD, lora_name=name, lora_path="hamlet")
        assert (status, error["code"], error["param"]) == (400, "adapter_exists", "lora_name")
    assert server.engine.loaded["king"].sha256 == "c" * 64


def test_max_adapters_is_enforced(open_server: OpenServer, adapters_folder: Path) -> None:
    server = open_server(adapters_from=adapters_folder, max_adapters=3)
    assert load(server, "one", "hamlet").status_code == 200
    status, error = server.error(LOAD, lora_name="two", lora_path="hamlet")
    assert (status, error["code"]) == (409, "adapters_full")
    server.client.post(UNLOAD, json={"lora_name": "king"})
    assert load(server, "two", "hamlet").status_code == 200


def test_unloading_an_unknown_adapter_is_404(server: Any) -> None:
    for name in ("hamlet", "tiny"):
        status, error = server.error(UNLOAD, lora_name=name)
        assert (status, error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_path": "a"}, "lora_name"),
        ({"lora_name": "", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a" * 101, "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a b", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a\n", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "../a", "lora_path": "a"}, "lora_name"),
        ({"lora_name": "é", "lora_path": "a"}, "lora_name"),
        ({"lora_name": 5, "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": ""}, "lora_path"),
        ({"lora_name": "a", "lora_path": "a" * 1025}, "lora_path"),
        ({"lora_name": "a", "lora_path": ["a"]}, "lora_path"),
        ({"lora_name": "a", "lora_path": "hamlet", "load_inplace": True}, "load_inplace"),
        ({"lora_name": "a", "lora_path": "hamlet", "load_inplace": 0}, "load_inplace"),
    ],
)
def test_invalid_fields_are_rejected_by_name(server: Any, body: dict[str, Any], param: str) -> None:
    status, error = server.error(LOAD, **body)
    assert (status, error["param"]) == (400, param)
    if param == "lora_name":
        assert server.error(UNLOAD, **body)[0] in (400, 404)


def test_extra_fields_of_vllm_clients_are_accepted(server: Any) -> None:
    more = {"load_inplace": False, "lora_int_id": 7, "base_model_name": None}
    assert server.client.post(LOAD, json={"lora_name": "a", "lora_path": "hamlet", **more}).status_code == 200
    assert server.client.post(UNLOAD, json={"lora_name": "a", "lora_int_id": 7}).status_code == 200


def test_api_key_and_origin_are_checked(open_server: OpenServer, adapters_folder: Path) -> None:
    server = open_server(adapters_from=adapters_folder, key="secret")
    body = {"lora_name": "a", "lora_path": "hamlet"}
    key, page = {"Authorization": "Bearer secret"}, {"Origin": "https://evil.example"}
    for path in (LOAD, UNLOAD):
        assert server.client.post(path, json=body).status_code == 401
        assert server.client.post(path, json=body, headers={**key, **page}).status_code == 403
    assert server.client.post(LOAD, json=body, headers=key).status_code == 200
    paths = server.client.get("/openapi.json", headers=key).json()["paths"]
    assert paths[LOAD]["post"]["security"] == [{"key": []}]


def test_loading_during_shutdown_is_503(server: Any) -> None:
    server.app.state.service.draining = True
    status, error = server.error(LOAD, lora_name="a", lora_path="hamlet")
    assert (status, error["code"]) == (503, "stopping")


def test_loads_and_unloads_are_logged(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    load(server, "a", "hamlet")
    server.client.post(UNLOAD, json={"lora_name": "a"})
    loaded, unloaded = (record.getMessage() for record in caplog.records if record.name == "octavo.server")
    sha256 = hashlib.sha256(b"adapters/hamlet").hexdigest()
    assert all("adapter a" in line and sha256 in line for line in (loaded, unloaded))


def test_unloading_waits_for_running_requests_and_accepts_no_new_ones(
    open_server: OpenServer, adapters_folder: Path
) -> None:
    async def scenario() -> None:
        server = open_server(adapters_from=adapters_folder, engine={"manual": True})
        request_body = {"model": "king", "prompt": "the", "max_tokens": 2}
        running = [Client(server.app, "/v1/completions", request_body) for _ in range(2)]
        await until(lambda: len(server.engine.active) == 2)
        unloads = [Client(server.app, UNLOAD, {"lora_name": "king"}) for _ in range(2)]
        await until(lambda: list(server.engine.draining_adapters) == ["king"])
        for path, body, status, words in (
            ("/v1/completions", request_body, 404, b"being unloaded"),
            (LOAD, {"lora_name": "king", "lora_path": "hamlet"}, 409, b"being unloaded"),
            ("/tokenize", {"prompt": "the"}, 200, b'"dddd'),  # the default adapter is now queen
        ):
            client = Client(server.app, path, body)
            await client.task
            assert client.status == status
            assert words in client.received
        assert not any(unload.task.done() for unload in unloads)
        for _ in range(2):
            server.engine.step()
        for client in [*running, *unloads]:
            await client.task
            assert client.status == 200
        assert (server.engine.draining_adapters, list(server.engine.loaded)) == ({}, ["queen"])
        again = Client(server.app, LOAD, {"lora_name": "king", "lora_path": "hamlet"})
        await again.task
        assert again.status == 200

    run_scenario(scenario())


def test_after_the_grace_time_unloading_is_409_and_draining_continues(
    open_server: OpenServer, adapters_folder: Path
) -> None:
    async def scenario() -> None:
        server = open_server(adapters_from=adapters_folder, grace_seconds=0, max_adapters=2, engine={"manual": True})
        running = Client(server.app, "/v1/completions", {"model": "king", "prompt": "the", "max_tokens": 2})
        await until(lambda: len(server.engine.active) == 1)
        early = Client(server.app, UNLOAD, {"lora_name": "king"})
        await early.task
        assert (early.status, early.headers[b"retry-after"]) == (409, b"2")
        assert b"adapter_in_use" in early.received
        assert b"accepts no new requests" in early.received
        full = Client(server.app, LOAD, {"lora_name": "new", "lora_path": "hamlet"})
        await full.task
        assert (full.status, b"adapters_full" in full.received) == (409, True), "a draining adapter counts as loaded"
        for _ in range(2):
            server.engine.step()
        await running.task
        assert running.status == 200
        late = Client(server.app, UNLOAD, {"lora_name": "king"})
        await late.task
        assert (late.status, server.engine.draining_adapters) == (200, {})

    run_scenario(scenario())


def test_streams_continue_while_an_adapter_loads_and_the_next_load_waits(
    open_server: OpenServer, adapters_folder: Path
) -> None:
    async def scenario() -> None:
        server = open_server(adapters_from=adapters_folder, engine={"manual": True})
        read, reading = threading.Event(), []
        plain: Callable[[str, Adapter], ServedAdapter] = server.engine.load_adapter

        def slow(name: str, adapter: Adapter) -> ServedAdapter:
            reading.append(name)
            assert read.wait(PATIENCE)
            return plain(name, adapter)

        server.engine.load_adapter = slow
        client = Client(server.app, "/v1/completions", {"prompt": "the king", "max_tokens": 8, "stream": True})
        await until(lambda: len(server.engine.active) == 1)
        loads = [Client(server.app, LOAD, {"lora_name": "new", "lora_path": "hamlet"}) for _ in range(2)]
        await until(lambda: reading == ["new"])
        for number in range(1, 9):
            server.engine.step()
            await until(lambda: client.received.count(b"data: {") == number)  # noqa: B023
        await asyncio.wait_for(client.task, PATIENCE)
        assert not any(client.task.done() for client in loads)
        read.set()
        await asyncio.gather(*(client.task for client in loads))
        assert sorted(client.status for client in loads) == [200, 400], "the name of the second is in use"
        assert reading == ["new"]

    run_scenario(scenario())


def test_errors_contain_paths_relative_to_the_folder(server: Any, adapters_folder: Path) -> None:
    """The reader's messages contain absolute paths; the response must not."""
    server.engine.read_errors["lear"] = (
        f"cannot be read: [Errno 13] Permission denied: '{adapters_folder / 'plays/lear/x'}'"
    )
    _, error = server.error(LOAD, lora_name="new", lora_path="plays/lear")
    assert str(adapters_folder) not in error["message"]
    assert f"plays{os.sep}lear{os.sep}x" in error["message"]
