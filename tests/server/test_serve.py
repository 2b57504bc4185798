"""`octavo serve`: option errors before it listens, and shutdown of the process."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from tests.forks import Forks, Process

from octavo.config import ServeOptions
from octavo.errors import UsageError
from octavo.server.process import bind
from octavo.server.serve import KEY_VARIABLE, adapter_folders, api_key, served_name

Octavo = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_reachable_server_needs_a_key_or_no_auth(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=KEY_VARIABLE):
        api_key(ServeOptions(host=host))
    assert api_key(ServeOptions(host=host, auth=False)) is None
    assert api_key(ServeOptions(host=host, api_key="secret")) == "secret"
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert api_key(ServeOptions(host=host)) == "other"


def test_on_loopback_the_key_is_optional_and_the_option_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api_key(ServeOptions()) is None
    assert ServeOptions().host == "127.0.0.1"
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert api_key(ServeOptions()) == "other"
    assert api_key(ServeOptions(api_key="secret")) == "secret"
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert api_key(ServeOptions()) is None


@pytest.mark.parametrize("key", ["", "two words", "línea", "a\n"])
def test_a_key_that_is_invalid_in_a_header_is_rejected(key: str) -> None:
    with pytest.raises(UsageError, match="ASCII"):
        api_key(ServeOptions(api_key=key))


def test_a_key_with_no_auth_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be combined"):
        api_key(ServeOptions(api_key="secret", auth=False))
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with pytest.raises(UsageError, match="cannot be combined"):
        api_key(ServeOptions(auth=False))


def test_adapter_folders() -> None:
    assert adapter_folders(ServeOptions(adapter=["a=b=c", "x/y:1=/z"])) == {"a": Path("b=c"), "x/y:1": Path("/z")}
    for wrong in ("folder", "=folder", "name=", "two words=x", "-a=x", "a" * 101 + "=x"):
        with pytest.raises(UsageError, match="NAME=FOLDER"):
            adapter_folders(ServeOptions(adapter=[wrong]))
    with pytest.raises(UsageError, match="two adapters"):
        adapter_folders(ServeOptions(adapter=["a=b", "a=c"]))


def test_the_served_name_is_the_folder_name(tmp_path: Path) -> None:
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("org/name") == "org/name"


def test_an_address_in_use_is_a_usage_error() -> None:
    bound_socket = bind("127.0.0.1", 0)
    port = bound_socket.getsockname()[1]
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass  # not listening yet while the model loads
    bound_socket.listen()
    with pytest.raises(UsageError, match=str(port)):
        bind("127.0.0.1", port)
    bound_socket.close()


def test_tcp_nodelay_is_set() -> None:
    """Nagle's algorithm delays each event by 40 ms. Both event loops disable it if the protocol is IPPROTO_TCP."""

    async def accepted() -> int:
        accepted_writer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(
            lambda _, writer: accepted_writer.set_result(writer), sock=bind("127.0.0.1", 0)
        )
        async with server:
            _, client = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer = await accepted_writer
            option: int = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for stream_writer in (writer, client):
                stream_writer.close()
                await stream_writer.wait_closed()
        return option

    assert asyncio.run(accepted())


def test_importing_the_cli_does_not_import_the_server() -> None:
    code = "import sys, octavo.cli; print(*sorted({'fastapi', 'uvicorn', 'starlette'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_without_fastapi_the_error_names_the_extra(octavo: Octavo, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.server import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    done = octavo("serve")
    assert done.code == 2
    assert "octavo[serve]" in done.err


def test_the_error_without_fastapi_needs_no_server_packages(tiny_llama: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["fastapi", "starlette", "uvicorn", "h11"]))  # as if they were not there
from octavo.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "serve", "--model", tiny_llama], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "octavo[serve]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loopback_server_does_not_look_up_host_names(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up takes seconds without a network."""
    look_ups = []

    def look_up() -> str:
        look_ups.append("fqdn")
        return "laptop.example"

    monkeypatch.setattr(socket, "getfqdn", look_up)
    monkeypatch.setattr("octavo.server.process.run", lambda *_, **__: None)
    for arguments in ([], ["--host", "0.0.0.0", "--no-auth"]):
        assert (
            octavo("serve", "--model", tiny_llama, "--port", 0, "--slots", 1, "--max-model-len", 8, *arguments).code
            == 0
        )
        assert len(look_ups) == (1 if arguments else 0)


def test_a_limit_of_new_tokens_over_the_context_is_a_warning(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.server.process.run", lambda *_, **__: None)
    for arguments, is_warned in (([], False), (["--max-new-tokens", 500], True), (["--max-new-tokens", 64], False)):
        done = octavo("serve", "--model", tiny_llama, "--port", 0, "--slots", 1, *arguments)
        assert done.code == 0
        assert ("prompt and answer have at most 128 tokens together" in done.err) == is_warned


def test_options_are_checked_before_the_model_is_loaded(octavo: Octavo, tmp_path: Path, tiny_llama: Path) -> None:
    for arguments, code, expected_message in (
        (["--host", "0.0.0.0"], 2, KEY_VARIABLE),
        (["--adapter", "x"], 2, "NAME=FOLDER"),
        (["--adapter", f"x={tmp_path}", "--port", "0"], 1, "holds no adapter"),
        (["--adapter", f"llama={tmp_path}", "--port", "0"], 2, "name of the base model"),
        (["--adapters-from", str(tmp_path / "missing")], 2, "is not a folder"),
    ):
        done = octavo("serve", "--model", tiny_llama, *arguments)
        assert (done.code, done.out) == (code, "")
        assert expected_message in done.err


def test_the_server_does_not_start_if_an_adapter_does_not_match(
    octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--out", tmp_path,
        "--steps", 1, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}, file)
    (file.parent / "octavo.json").unlink()  # it has the hash of the original tensors
    done = octavo("serve", "--model", tiny_llama, "--adapter", f"king={tmp_path / 'adapter'}", "--port", 0)
    assert done.code == 1
    assert re.search(r"king: .*layers\.7", done.err, re.DOTALL)
    assert "Traceback" not in done.err


# A server whose engine generates only during shutdown, after 0.1 seconds of the grace time; with `writes` it generates
# all the time.
PROCESS = """
import asyncio, sys, threading, time
sys.path.insert(0, {folder!r})
from conftest import FakeEngine
from octavo.config import ServeOptions
from octavo.server import protocol
from octavo.server.app import create_app
from octavo.server.process import bind, run
from octavo.store.tokenizer_files import load_tokenizer
from octavo.streams import standard_streams
from pathlib import Path

engine = FakeEngine(load_tokenizer(Path({model!r})), manual=True, context=100_000)
grace = []
protocol.PROBE_SECONDS = 0.5  # interval of checks whether a waiting client has disconnected

def stop(seconds):
    grace.append((seconds, app.state.service.draining))
    time.sleep(0.1)
    if {cancel}:
        for request in engine.active:
            request.stream.cancel()
    while engine.active:
        engine.step()

def listening():
    print("listening", type(asyncio.get_running_loop()).__module__.partition(".")[0], flush=True)

def write():
    while True:
        engine.step()
        time.sleep(0.002)

if {writes}:
    threading.Thread(target=write, daemon=True).start()
bound_socket = bind("127.0.0.1", 0)
options = ServeOptions(grace_seconds=7, max_new_tokens=50_000, log_level="debug")
print(bound_socket.getsockname()[1], flush=True)
app = create_app(engine, options, key={key!r})
with standard_streams():  # as the command line does
    run(app, bound_socket, options=options, listening=listening, stop_engine=stop)
print("ended", grace, flush=True)
"""

PATIENCE = 120  # seconds until a process counts as stuck
Start = Callable[..., tuple[Process, int]]


@pytest.fixture(params=["asyncio", "uvloop"])
def start(request: pytest.FixtureRequest, tiny_llama: Path, forks: Forks) -> Iterator[Start]:
    """Starts PROCESS with each event loop; returns the process and its port. uvicorn uses uvloop if it is installed."""
    started = []
    hidden = "import sys; sys.modules['uvloop'] = None\n" if request.param == "asyncio" else "import uvloop\n"

    def make(*, cancel: bool = False, writes: bool = False, key: str | None = None) -> tuple[Process, int]:
        code = PROCESS.format(
            folder=str(Path(__file__).parent), model=str(tiny_llama), cancel=cancel, writes=writes, key=key
        )
        process = forks.run(hidden + code)
        started.append(process)
        port = process.stdout.readline()
        assert process.stdout.readline() == f"listening {request.param}\n"
        return process, int(port)

    yield make
    for process in started:
        process.close()


def send_request(port: int, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def wait_for_running(port: int, count: int, *, waiting: int = 0) -> str:
    """Waits until `count` requests run and `waiting` wait; returns the metrics."""
    deadline = monotonic() + PATIENCE
    while monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as response:
            text: str = response.read().decode()
        if f"octavo_running {count}\n" in text and f"octavo_waiting {waiting}\n" in text:
            return text
        sleep(0.01)
    raise AssertionError(text)


def test_sigterm_finishes_running_requests_and_exits_with_0(start: Start) -> None:
    process, port = start()
    answers: dict[bool, tuple[int, str]] = {}

    def client(stream: bool) -> None:
        answers[stream] = send_request(port, {"prompt": "the king", "max_tokens": 4, "stream": stream})

    clients = [threading.Thread(target=client, args=[stream]) for stream in (False, True)]
    for thread in clients:
        thread.start()
    wait_for_running(port, 2)
    process.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join()
    out, err = process.communicate(timeout=PATIENCE)
    for stream, (status, text) in answers.items():
        assert status == 200
        assert '"finish_reason":"length"' in text
        assert ("[DONE]" in text) is stream
    assert (out, process.returncode) == ("ended [(7.0, True)]\n", 0)
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass


def test_requests_not_finished_in_the_grace_time_get_503(start: Start) -> None:
    process, port = start(cancel=True)
    answers: list[tuple[int, str]] = []
    client = threading.Thread(
        target=lambda: answers.append(send_request(port, {"prompt": "the king", "max_tokens": 4}))
    )
    client.start()
    wait_for_running(port, 1)
    process.send_signal(signal.SIGINT)
    client.join()
    _, err = process.communicate(timeout=PATIENCE)
    assert answers[0][0] == 503
    assert process.returncode == 0
    assert "Traceback" not in err


# A client with a stream of two choices, a stream in the queue, and a request without streaming in the queue.
KILLED = """
import json, socket, sys
sockets = []
for more in ({"n": 2, "stream": True}, {"stream": True}, {}):
    body = json.dumps({"prompt": "the king", "max_tokens": 50_000, **more})
    sockets.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: {len(body)}\\r\\n"
    sockets[-1].sendall((head + "Content-Type: application/json\\r\\n\\r\\n" + body).encode())
    if more:
        assert sockets[-1].recv(1)
print("reading", flush=True)
sys.stdin.read()
"""


def test_a_killed_client_frees_all_its_slots(start: Start) -> None:
    _, port = start(writes=True)
    client = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == "reading\n"
        wait_for_running(port, 2, waiting=2)
        client.send_signal(signal.SIGKILL)
    counts = wait_for_running(port, 0)
    assert "octavo_cancelled_total 4\n" in counts
    assert "octavo_requests_total 4\n" in counts
    status, _ = send_request(port, {"prompt": "the king", "n": 4, "max_tokens": 2})
    assert status == 200


def test_an_unread_stderr_blocks_neither_responses_nor_shutdown(start: Start) -> None:
    process, port = start(writes=True)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    for _ in range(1200):  # each request is a log line; a pipe holds 64 KiB
        connection.request("GET", "/metrics")
        assert connection.getresponse().read()
    connection.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_neither_the_key_nor_a_prompt_is_logged(start: Start) -> None:
    process, port = start(writes=True, key="very-secret")
    for key, expected in (("very-secret", 200), ("very-secre", 401)):
        assert send_request(port, {"prompt": "the king", "max_tokens": 2}, Authorization=f"Bearer {key}")[0] == expected
    assert send_request(port, {"prompt": "the king", "n": "very-secret"}, Authorization="Bearer very-secret")[0] == 400
    with socket.create_connection(("127.0.0.1", port)) as garbage:
        garbage.sendall(b"the king: very-secret\r\n\r\n")
        assert b"invalid_http" in garbage.recv(4096), "the connection class is octavo's"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert "/v1/completions" in err, "every request is logged"
    assert not [words for words in ("very-secre", "the king", "Traceback") if words in out + err]


def test_a_second_ctrl_c_exits_immediately_without_abort_or_traceback(start: Start) -> None:
    """The first Ctrl-C waits for the running requests, which take very long here."""
    process, port = start(writes=True)
    clients = []
    for _ in range(2):
        body = json.dumps({"prompt": "the king", "max_tokens": 50_000, "stream": True}).encode()
        clients.append(socket.create_connection(("127.0.0.1", port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        clients[-1].sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert clients[-1].recv(1)
    wait_for_running(port, 2)
    process.send_signal(signal.SIGINT)
    while b"Shutting down" not in (line := os.read(process.stderr.fileno(), 65536)):
        assert line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    for client in clients:
        client.close()
    assert process.returncode == 130
    assert "Stopped at once." in err
    assert "Traceback" not in err
    assert "ended" not in out


def test_sighup_shuts_down_as_sigterm_does(start: Start) -> None:
    process, port = start()
    answers: list[tuple[int, str]] = []
    client = threading.Thread(
        target=lambda: answers.append(send_request(port, {"prompt": "the king", "max_tokens": 4}))
    )
    client.start()
    wait_for_running(port, 1)
    process.send_signal(signal.SIGHUP)
    client.join()
    out, err = process.communicate(timeout=PATIENCE)
    assert (answers[0][0], process.returncode) == (200, 0)
    assert out.startswith("ended")
    assert "Traceback" not in err
