"""The guard: Host, Origin, API key, body size, number of requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octavo.config import ServeOptions
from octavo.server import guard
from octavo.server.app import guard_rules
from octavo.server.guard import Guard, Rules
from octavo.server.metrics import Metrics

OpenServer = Callable[..., Any]

POST_ROUTES = ["/v1/completions", "/v1/chat/completions", "/prompt/", "/prompt", "/tokenize"]
GET_ROUTES = ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nowhere", "/", "/version"]
PROBES = ["/health", "/ready", "/ping"]


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "localhost."]
)
def test_loopback_names_are_allowed_hosts(server: Any, host: str) -> None:
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "8.8.8.8", "", "laptop", "[::2]", "evil@localhost"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
def test_other_hosts_are_rejected(server: Any, host: str, path: str) -> None:
    response = server.client.get(path, headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


def test_two_host_headers_are_rejected(server: Any) -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert server.client.get("/v1/models", headers=headers).status_code == 403


def test_hosts_option(open_server: OpenServer) -> None:
    named = open_server(hosts=["My.Example"]).client
    assert named.get("/health", headers={"Host": "my.example:80"}).status_code == 200
    assert named.get("/health", headers={"Host": "localhost"}).status_code == 200
    assert named.get("/health", headers={"Host": "other.example"}).status_code == 403
    assert open_server(hosts=["*"]).client.get("/health", headers={"Host": "any.example"}).status_code == 200


def test_a_wildcard_server_accepts_its_names_and_any_address(open_server: OpenServer) -> None:
    client = open_server(host="0.0.0.0").client
    for host, status in (("laptop", 200), ("192.168.1.5:8000", 200), ("[fe80::1]", 200), ("evil.example", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_a_server_on_one_address_accepts_only_that(open_server: OpenServer) -> None:
    client = open_server(host="192.168.1.5").client
    for host, status in (("laptop", 200), ("192.168.1.5:8000", 200), ("192.168.1.6", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("path", POST_ROUTES)
def test_other_origins_cannot_change_state(server: Any, path: str) -> None:
    body = {"prompt": "the", "input": "the", "messages": [{"role": "user", "content": "the"}]}
    for origin in ("https://evil.example", "null", "http://localhost:9", "http://localhost:8000.evil.example", ""):
        response = server.client.post(path, json=body, headers={"Origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed"), origin
        assert "access-control-allow-origin" not in response.headers
    assert server.engine.submitted == []
    for headers in ({}, {"Origin": "http://localhost:8000"}, {"Origin": "HTTP://LOCALHOST:8000"}):
        assert server.client.post(path, json=body, headers=headers).status_code == 200


def test_the_origin_must_equal_the_requested_host(open_server: OpenServer) -> None:
    client = open_server(hosts=["my.example"]).client
    for host, origin, status in (
        ("my.example", "https://my.example", 200),
        ("my.example", "http://localhost:8000", 403),
        ("localhost:8000", "https://my.example", 403),
    ):
        response = client.post("/tokenize", json={"prompt": "the"}, headers={"Host": host, "Origin": origin})
        assert response.status_code == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "MADEUP"])
def test_the_origin_is_checked_for_every_unsafe_method(server: Any, method: str) -> None:
    response = server.client.request(method, "/v1/models", headers={"Origin": "https://evil.example"})
    assert response.status_code == 403
    assert server.client.request(method, "/v1/models").status_code == 405


def test_other_origins_may_get_but_receive_no_cors_headers(server: Any) -> None:
    response = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


# Headers of OpenAI's JavaScript client.
HEADERS = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": HEADERS}


def test_allowed_origins_may_send_requests_with_a_key(open_server: OpenServer) -> None:
    client = open_server(origins=["https://Page.example/"], key="secret").client
    origin = {"Origin": "https://page.example"}
    before = client.options("/v1/completions", headers={**origin, **PREFLIGHT})
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in before.headers
    allowed = before.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    assert set(HEADERS.split(",")) <= set(allowed)
    response = client.post(
        "/v1/completions", json={"prompt": "the"}, headers={**origin, "Authorization": "Bearer secret"}
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    rejected = client.post("/v1/completions", json={"prompt": "the"}, headers=origin)
    assert (rejected.status_code, rejected.headers["access-control-allow-origin"]) == (401, "https://page.example")
    other = client.options("/v1/completions", headers={"Origin": "https://evil.example", **PREFLIGHT})
    assert other.status_code == 400
    assert client.post("/tokenize", json={"prompt": "a"}, headers={"Origin": "https://evil.example"}).status_code == 403


def test_without_origins_there_is_no_preflight(server: Any) -> None:
    response = server.client.options("/v1/completions", headers={"Origin": "https://page.example", **PREFLIGHT})
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize("path", [*GET_ROUTES, *POST_ROUTES])
@pytest.mark.parametrize(
    "header",
    [None, "Bearer", "Bearer wrong", "Bearer secre", "Bearer secret1", "Basic secret", "secret", "Bearer sécret"],
)
def test_all_routes_except_probes_need_the_key(open_server: OpenServer, path: str, header: str | None) -> None:
    server = open_server(key="secret")
    headers = {} if header is None else {"Authorization": header.encode()}
    method = "POST" if path in POST_ROUTES else "GET"
    response = server.client.request(
        method, path, headers=headers, json={"prompt": "the"} if method == "POST" else None
    )
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "secret" not in response.text
    assert server.engine.submitted == []


@pytest.mark.parametrize("path", [*GET_ROUTES, *PROBES])
def test_the_key_is_accepted_and_probes_need_none(open_server: OpenServer, path: str) -> None:
    client = open_server(key="secret").client
    expected = 404 if path == "/nowhere" else 200
    assert client.get(path, headers={"Authorization": "bearer secret"}).status_code == expected
    if path in PROBES:
        assert client.get(path).status_code == 200


def test_the_key_is_compared_in_constant_time(open_server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(header: bytes, expected: bytes) -> bool:
        compared.append((header, expected))
        return True

    monkeypatch.setattr(guard, "compare_digest", compare)
    assert open_server(key="secret").client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 200
    assert compared == [(b"x", b"secret")]


def test_two_authorization_headers_are_rejected(open_server: OpenServer) -> None:
    headers = [("Authorization", "Bearer secret"), ("Authorization", "Bearer secret")]
    assert open_server(key="secret").client.get("/v1/models", headers=headers).status_code == 401


def chunks(*sizes: int) -> Iterator[bytes]:
    for size in sizes:
        yield b" " * size


def test_content_length_limit(open_server: OpenServer) -> None:
    server = open_server(max_body_bytes=1024)
    fits = json.dumps({"prompt": "the"}).encode().ljust(1024)
    json_type = {"Content-Type": "application/json"}
    assert server.client.post("/v1/completions", content=fits, headers=json_type).status_code == 200
    response = server.client.post("/v1/completions", content=fits + b" ", headers=json_type)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers["connection"] == "close"


Messages = list[dict[str, Any]]


async def send_through_guard(
    messages: Messages, headers: dict[str, str], *, limit: int = 1024, app: Any = None
) -> tuple[Messages, Messages, list[bytes]]:
    """Sends messages through a guard to an app that reads its body.

    Returns (messages sent to the client, messages not read, bodies that the app read).
    """
    sent: Messages = []
    read: list[bytes] = []
    unread = list(messages)

    async def receive() -> dict[str, Any]:
        if not unread:
            await asyncio.Event().wait()
        return unread.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        read.append(message["body"])
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    rules = Rules(None, frozenset(["localhost"]), frozenset(), requests=2, body_bytes=limit)
    scope = {
        "type": "http", "method": "POST", "path": "/x",
        "headers": [(key.lower().encode(), value.encode()) for key, value in {"host": "localhost", **headers}.items()],
    }  # fmt: skip
    await Guard(app or plain, rules=rules, metrics=Metrics())(scope, receive, send)
    return sent, unread, read


def body_message(size: int, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "5"}, {"Content-Length": "-1"}, {"Content-Length": "many"}])
def test_received_bytes_are_counted_regardless_of_content_length(headers: dict[str, str]) -> None:
    sent, unread, read = asyncio.run(send_through_guard([body_message(1000)] * 99, headers))
    assert sent[0]["status"] == 413
    assert len(unread) == 97, "reading stops when the limit is exceeded"
    assert read == []


def test_a_body_in_several_messages_is_joined() -> None:
    sent, _, read = asyncio.run(
        send_through_guard([body_message(1000), body_message(0), body_message(24, more=False)], {})
    )
    assert sent[0]["status"] == 200
    assert read == [b"x" * 1024]


def test_a_body_with_a_too_large_content_length_is_not_read() -> None:
    for length in ("1025", "9" * 5000):
        sent, unread, _ = asyncio.run(send_through_guard([body_message(10, more=False)], {"Content-Length": length}))
        assert (sent[0]["status"], len(unread)) == (413, 1)


def test_body_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    sent, _, read = asyncio.run(send_through_guard([body_message(10)], {}))
    assert sent[0]["status"] == 408
    assert read == []


def test_a_disconnect_during_the_body_is_400() -> None:
    sent, _, read = asyncio.run(send_through_guard([body_message(10), {"type": "http.disconnect"}], {}))
    assert (sent[0]["status"], read) == (400, [])


def test_chunked_bodies_are_counted(open_server: OpenServer) -> None:
    server = open_server(max_body_bytes=1024)
    response = server.client.post("/tokenize", content=chunks(600, 600), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_requests_beyond_the_limit_are_rejected_without_reading_the_body() -> None:
    """A request beyond the limit is rejected before its body is read; the others continue."""

    async def scenario() -> None:
        rules = Rules(None, frozenset(["localhost"]), frozenset(), requests=2, body_bytes=99)
        release = asyncio.Event()
        statuses: list[int] = []
        bodies_read = 0

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send_request(method: str) -> None:
            async def receive() -> dict[str, Any]:
                nonlocal bodies_read
                bodies_read += method == "POST"
                return body_message(1, more=False)

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    if message["status"] == 429:
                        assert dict(message["headers"])[b"retry-after"] == b"2"

            scope = {"type": "http", "method": method, "path": "/x", "headers": [(b"host", b"localhost")]}
            await guard_app(scope, receive, send)

        guard_app = Guard(slow, rules=rules, metrics=Metrics())
        running = [asyncio.create_task(send_request("POST")) for _ in range(2)]
        await asyncio.sleep(0)
        await send_request("POST")
        assert statuses == [429]
        assert bodies_read == 2
        looking = asyncio.create_task(send_request("GET"))  # GET requests are not limited
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*running, looking)
        await send_request("POST")
        assert statuses == [429, 200, 200, 200, 200]

    asyncio.run(scenario())


def test_guard_rules_of_the_options() -> None:
    rules = guard_rules(ServeOptions(slots=3, queue=5, max_body_bytes=2000), key="k", names=("laptop",))
    assert (rules.key, rules.body_bytes, rules.any_address) == ("k", 2000, False)
    assert rules.requests > 8
    assert "laptop" not in rules.hosts


def test_router_errors_have_openais_format(server: Any) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        response = server.client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert server.client.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'"the"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000,
     b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "the", "model": "\\ud800"}'],
)  # fmt: skip
@pytest.mark.parametrize("path", POST_ROUTES)
def test_an_invalid_body_is_400(server: Any, path: str, body: bytes) -> None:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.engine.submitted == []


@pytest.mark.parametrize("path", POST_ROUTES)
def test_the_error_for_another_content_type_names_the_right_one(server: Any, path: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for body, headers in ((b'{"prompt": "the"}', form), (b"[]", {"Content-Type": "application/json"})):
        error = server.client.post(path, content=body, headers=headers).json()["error"]
        assert "Content-Type: application/json" in error["message"]
        assert error["param"] is None


def test_an_unexpected_exception_is_500_without_internal_details(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.engine, "submit", fail, raising=False)
    response = server.client.post("/v1/completions", json={"prompt": "the"})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/ping", "/", "/version", "/v1/models", "/metrics", "/openapi.json"]
)
def test_head_equals_get_without_the_body(server: Any, path: str) -> None:
    got, head = server.client.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_has_the_status_of_get(open_server: OpenServer) -> None:
    client = open_server(key="secret").client
    for path, headers, status in (
        ("/v1/models", {}, 401),
        ("/health", {"Host": "evil.example"}, 403),
        ("/nowhere", {"Authorization": "Bearer secret"}, 404),
        ("/v1/completions", {"Authorization": "Bearer secret"}, 405),
    ):
        response = client.head(path, headers=headers)
        assert (response.status_code, response.content) == (status, b"")
    text = client.get("/metrics", headers={"Authorization": "Bearer secret"}).text
    assert 'route="none",method="HEAD",status="401"} 1' in text
