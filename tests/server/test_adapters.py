"""Adapters that come and go while the server runs: where they may lie, what is refused, what stays meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.clients import PATIENCE, Client, play, until

from octavo.infer.requests import ServedAdapter

Open = Callable[..., Any]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder of two adapters, with a third one beside it."""
    for name in ("shelf/hamlet", "shelf/plays/lear", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    return tmp_path / "shelf"


@pytest.fixture
def setting(opened: Open, shelf: Path) -> Any:
    return opened(adapters_from=shelf)


def names(setting: Any) -> list[str]:
    return [card["id"] for card in setting.client.get("/v1/models").json()["data"]]


def load(setting: Any, name: str, path: str | Path) -> Any:
    return setting.client.post(LOAD, json={"lora_name": name, "lora_path": str(path)})


def test_without_the_folder_there_are_no_such_routes(opened: Open) -> None:
    setting = opened()
    assert load(setting, "hamlet", "hamlet").status_code == 404
    assert setting.client.post(UNLOAD, json={"lora_name": "king"}).status_code == 404
    assert not {LOAD, UNLOAD} & setting.client.get("/openapi.json").json()["paths"].keys()
    assert names(setting) == ["tiny", "king", "queen"]


def test_an_adapter_comes_answers_and_goes(setting: Any, shelf: Path) -> None:
    answer = load(setting, "a/hamlet:1", "hamlet")
    sha256 = hashlib.sha256(b"shelf/hamlet").hexdigest()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert answer.text.startswith("Success")
    assert answer.headers["X-System-Fingerprint"] == sha256
    assert names(setting) == ["tiny", "king", "queen", "a/hamlet:1"]
    assert setting.engine.held["a/hamlet:1"].folder == shelf / "hamlet"
    assert setting.ask("/v1/completions", model="a/hamlet:1", prompt="the")["system_fingerprint"] == sha256
    answer = setting.client.post(UNLOAD, json={"lora_name": "a/hamlet:1"})
    assert (answer.status_code, answer.text[:7]) == (200, "Success")
    assert names(setting) == ["tiny", "king", "queen"]
    assert setting.refusal("/v1/completions", model="a/hamlet:1", prompt="the")[0] == 404


@pytest.mark.parametrize("path", ["hamlet", "./hamlet/", "plays/lear", "link", "{shelf}/hamlet", "{other}/plays/lear"])
def test_what_lies_below_the_folder_can_be_loaded(opened: Open, shelf: Path, path: str) -> None:
    (shelf / "link").symlink_to(shelf / "hamlet")
    other = shelf.parent / "other"
    other.symlink_to(shelf)
    for given in (shelf, other):
        setting = opened(adapters_from=given)
        place = path.format(shelf=shelf, other=given)
        assert load(setting, "hamlet", place).status_code == 200


OUTSIDE = [
    "..", ".", "../outside", "hamlet/../../outside", "hamlet/..", "../shelf/hamlet", "/", "/etc", "/nowhere",
    "{outside}", "{shelf}", "{shelf}/../outside", "{shelf}2", "out", "out/deeper", "dangling", "circle", "hamlet/\0",
    "files", "q" * 300, "hamlet/" * 140,
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_of_what_lies_outside_nothing_is_told(setting: Any, shelf: Path, path: str) -> None:
    outside = shelf.parent / "outside"
    (shelf / "out").symlink_to(outside)
    (shelf / "dangling").symlink_to(shelf.parent / "missing")
    (shelf / "circle").symlink_to(shelf / "circle")
    (shelf / "files").mkdir()
    (shelf / "files" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    status, error = setting.refusal(LOAD, lora_name="new", lora_path=path.format(shelf=shelf, outside=outside))
    assert (status, error["param"]) in ((400, "lora_path"), (404, "lora_path"))
    assert error["message"].startswith("`lora_path` is not a folder below") or path in ("q" * 300, "hamlet/" * 140)
    assert str(shelf.parent) not in error["message"]
    assert "new" not in setting.engine.held


def test_whether_a_link_stands_outside_makes_no_difference(setting: Any, shelf: Path) -> None:
    """`..` is not followed through what is outside: its answer would tell what is there."""
    before = setting.refusal(LOAD, lora_name="new", lora_path="../door/../shelf/hamlet")
    (shelf.parent / "door").symlink_to("/")
    assert setting.refusal(LOAD, lora_name="new", lora_path="../door/../shelf/hamlet") == before


def test_a_folder_that_is_not_there_is_404(setting: Any) -> None:
    status, error = setting.refusal(LOAD, lora_name="new", lora_path="macbeth")
    assert (status, error["param"], error["type"]) == (404, "lora_path", "not_found_error")
    assert setting.refusal(LOAD, lora_name="new", lora_path="hamlet/adapter_model.safetensors")[0] == 404


def test_one_that_does_not_fit_is_refused_with_the_reason_and_nothing_of_it_stays(setting: Any, shelf: Path) -> None:
    setting.engine.misfits["hamlet"] = "has no place for layers.7"
    status, error = setting.refusal(LOAD, lora_name="new", lora_path="hamlet")
    assert (status, error["code"]) == (400, "adapter_refused")
    assert error["message"] == "The adapter in hamlet has no place for layers.7. Give another one."
    assert names(setting) == ["tiny", "king", "queen"]


@pytest.mark.parametrize("error", [IndexError("x"), TypeError("x"), OSError("x"), RecursionError()])
def test_broken_files_are_the_clients_fault(setting: Any, error: Exception) -> None:
    setting.engine.misfits["hamlet"] = error
    status, told = setting.refusal(LOAD, lora_name="new", lora_path="hamlet")
    assert (status, told["code"], told["message"]) == (400, "adapter_refused", "The adapter's files are broken.")


def test_one_that_was_trained_on_other_weights_is_served_and_that_is_said(setting: Any, shelf: Path) -> None:
    for number, (base, said) in enumerate(((setting.engine.base_sha256, False), ("other", True), (None, False))):
        (shelf / "hamlet" / "octavo.json").write_text(json.dumps({"base": {"sha256": base}}))
        answer = load(setting, f"a{number}", "hamlet")
        assert answer.status_code == 200
        assert ("other base weights" in answer.text) is said


def test_a_name_that_is_taken_is_refused(setting: Any) -> None:
    for name in ("king", "tiny"):
        status, error = setting.refusal(LOAD, lora_name=name, lora_path="hamlet")
        assert (status, error["code"], error["param"]) == (400, "adapter_exists", "lora_name")
    assert setting.engine.held["king"].sha256 == "c" * 64


def test_no_more_are_loaded_than_may_be_held(opened: Open, shelf: Path) -> None:
    setting = opened(adapters_from=shelf, max_adapters=3)
    assert load(setting, "one", "hamlet").status_code == 200
    status, error = setting.refusal(LOAD, lora_name="two", lora_path="hamlet")
    assert (status, error["code"]) == (409, "adapters_full")
    setting.client.post(UNLOAD, json={"lora_name": "king"})
    assert load(setting, "two", "hamlet").status_code == 200


def test_what_is_not_served_cannot_be_removed(setting: Any) -> None:
    for name in ("hamlet", "tiny"):
        status, error = setting.refusal(UNLOAD, lora_name=name)
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
def test_what_is_out_of_bounds_is_refused_by_name(setting: Any, body: dict[str, Any], param: str) -> None:
    status, error = setting.refusal(LOAD, **body)
    assert (status, error["param"]) == (400, param)
    if param == "lora_name":
        assert setting.refusal(UNLOAD, **body)[0] in (400, 404)


def test_what_vllms_clients_send_along_is_taken(setting: Any) -> None:
    more = {"load_inplace": False, "lora_int_id": 7, "base_model_name": None}
    assert setting.client.post(LOAD, json={"lora_name": "a", "lora_path": "hamlet", **more}).status_code == 200
    assert setting.client.post(UNLOAD, json={"lora_name": "a", "lora_int_id": 7}).status_code == 200


def test_the_key_and_the_origin_count_here_too(opened: Open, shelf: Path) -> None:
    setting = opened(adapters_from=shelf, key="secret")
    body = {"lora_name": "a", "lora_path": "hamlet"}
    key, page = {"Authorization": "Bearer secret"}, {"Origin": "https://evil.example"}
    for path in (LOAD, UNLOAD):
        assert setting.client.post(path, json=body).status_code == 401
        assert setting.client.post(path, json=body, headers={**key, **page}).status_code == 403
    assert setting.client.post(LOAD, json=body, headers=key).status_code == 200
    paths = setting.client.get("/openapi.json", headers=key).json()["paths"]
    assert paths[LOAD]["post"]["security"] == [{"key": []}]


def test_a_server_that_stops_loads_nothing(setting: Any) -> None:
    setting.app.state.service.draining = True
    status, error = setting.refusal(LOAD, lora_name="a", lora_path="hamlet")
    assert (status, error["code"]) == (503, "stopping")


def test_comings_and_goings_are_logged(setting: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    load(setting, "a", "hamlet")
    setting.client.post(UNLOAD, json={"lora_name": "a"})
    loaded, unloaded = (record.getMessage() for record in caplog.records if record.name == "octavo.server")
    sha256 = hashlib.sha256(b"shelf/hamlet").hexdigest()
    assert all("adapter a" in line and sha256 in line for line in (loaded, unloaded))


def test_one_that_is_used_takes_no_more_and_goes_when_its_requests_are_done(opened: Open, shelf: Path) -> None:
    async def scene() -> None:
        setting = opened(adapters_from=shelf, engine={"by_hand": True})
        asked = {"model": "king", "prompt": "the", "max_tokens": 2}
        running = [Client(setting.app, "/v1/completions", asked) for _ in range(2)]
        await until(lambda: len(setting.engine.runs) == 2)
        unloads = [Client(setting.app, UNLOAD, {"lora_name": "king"}) for _ in range(2)]
        await until(lambda: list(setting.engine.leaving) == ["king"])
        for path, body, status, words in (
            ("/v1/completions", asked, 404, b"being unloaded"),
            (LOAD, {"lora_name": "king", "lora_path": "hamlet"}, 409, b"being unloaded"),
            ("/tokenize", {"prompt": "the"}, 200, b'"dddd'),  # the first adapter is now another one
        ):
            client = Client(setting.app, path, body)
            await client.task
            assert client.status == status
            assert words in client.received
        assert not any(unload.task.done() for unload in unloads)
        for _ in range(2):
            setting.engine.step()
        for client in [*running, *unloads]:
            await client.task
            assert client.status == 200
        assert (setting.engine.leaving, list(setting.engine.held)) == ({}, ["queen"])
        again = Client(setting.app, LOAD, {"lora_name": "king", "lora_path": "hamlet"})
        await again.task
        assert again.status == 200

    play(scene())


def test_one_that_is_used_for_longer_than_the_grace_time_goes_on_draining(opened: Open, shelf: Path) -> None:
    async def scene() -> None:
        setting = opened(adapters_from=shelf, grace_seconds=0, max_adapters=2, engine={"by_hand": True})
        running = Client(setting.app, "/v1/completions", {"model": "king", "prompt": "the", "max_tokens": 2})
        await until(lambda: len(setting.engine.runs) == 1)
        early = Client(setting.app, UNLOAD, {"lora_name": "king"})
        await early.task
        assert (early.status, early.headers[b"retry-after"]) == (409, b"2")
        assert b"adapter_in_use" in early.received
        assert b"takes no more" in early.received
        full = Client(setting.app, LOAD, {"lora_name": "new", "lora_path": "hamlet"})
        await full.task
        assert (full.status, b"adapters_full" in full.received) == (409, True), "a draining one is still held"
        for _ in range(2):
            setting.engine.step()
        await running.task
        assert running.status == 200
        late = Client(setting.app, UNLOAD, {"lora_name": "king"})
        await late.task
        assert (late.status, setting.engine.leaving) == (200, {})

    play(scene())


def test_while_one_is_read_streams_go_on_and_the_next_waits(opened: Open, shelf: Path) -> None:
    async def scene() -> None:
        setting = opened(adapters_from=shelf, engine={"by_hand": True})
        read, reading = threading.Event(), []
        plain: Callable[[str, Path], ServedAdapter] = setting.engine.load_adapter

        def slow(name: str, folder: Path) -> ServedAdapter:
            reading.append(name)
            assert read.wait(PATIENCE)
            return plain(name, folder)

        setting.engine.load_adapter = slow
        client = Client(setting.app, "/v1/completions", {"prompt": "the king", "max_tokens": 8, "stream": True})
        await until(lambda: len(setting.engine.runs) == 1)
        loads = [Client(setting.app, LOAD, {"lora_name": "new", "lora_path": "hamlet"}) for _ in range(2)]
        await until(lambda: reading == ["new"])
        for number in range(1, 9):
            setting.engine.step()
            await until(lambda: client.received.count(b"data: {") == number)  # noqa: B023
        await asyncio.wait_for(client.task, PATIENCE)
        assert not any(each.task.done() for each in loads)
        read.set()
        await asyncio.gather(*(each.task for each in loads))
        assert sorted(each.status for each in loads) == [200, 400], "the second finds the name taken"
        assert reading == ["new"]

    play(scene())


def test_a_folder_that_may_not_be_read_is_refused_without_its_whole_path(setting: Any, shelf: Path) -> None:
    """The engine's own messages name the folder: from the shelf on, that is what the client asked for."""
    setting.engine.misfits["lear"] = f"cannot be read: [Errno 13] Permission denied: '{shelf / 'plays/lear/x'}'"
    _, error = setting.refusal(LOAD, lora_name="new", lora_path="plays/lear")
    assert str(shelf) not in error["message"]
    assert f"plays{os.sep}lear{os.sep}x" in error["message"]
