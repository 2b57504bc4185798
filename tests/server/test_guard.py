"""What stands before every route: Host, Origin, the key, the size of bodies, the number of requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octavo.config import ServeOptions
from octavo.server import guard
from octavo.server.app import rules_of
from octavo.server.guard import Guard, Rules
from octavo.server.metrics import Metrics

Open = Callable[..., Any]

STATES = ["/v1/completions", "/v1/chat/completions", "/prompt/", "/prompt", "/tokenize"]
LOOKS = ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nowhere", "/", "/version"]
OPEN = ["/health", "/ready", "/ping"]


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "localhost."]
)
def test_this_machines_own_names_are_hosts(setting: Any, host: str) -> None:
    assert setting.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "8.8.8.8", "", "laptop", "[::2]", "evil@localhost"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
def test_other_hosts_are_refused(setting: Any, host: str, path: str) -> None:
    answer = setting.client.get(path, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


def test_a_request_that_names_two_hosts_is_refused(setting: Any) -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert setting.client.get("/v1/models", headers=headers).status_code == 403


def test_hosts_can_be_named(opened: Open) -> None:
    named = opened(hosts=["My.Example"]).client
    assert named.get("/health", headers={"Host": "my.example:80"}).status_code == 200
    assert named.get("/health", headers={"Host": "localhost"}).status_code == 200
    assert named.get("/health", headers={"Host": "other.example"}).status_code == 403
    assert opened(hosts=["*"]).client.get("/health", headers={"Host": "any.example"}).status_code == 200


def test_a_server_on_all_addresses_goes_by_the_machines_names_and_any_address(opened: Open) -> None:
    client = opened(host="0.0.0.0").client
    for host, status in (("laptop", 200), ("192.168.1.5:8000", 200), ("[fe80::1]", 200), ("evil.example", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_a_server_on_one_address_goes_by_that(opened: Open) -> None:
    client = opened(host="192.168.1.5").client
    for host, status in (("laptop", 200), ("192.168.1.5:8000", 200), ("192.168.1.6", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("path", STATES)
def test_pages_of_others_change_nothing(setting: Any, path: str) -> None:
    body = {"prompt": "the", "input": "the", "messages": [{"role": "user", "content": "the"}]}
    for origin in ("https://evil.example", "null", "http://localhost:9", "http://localhost:8000.evil.example", ""):
        answer = setting.client.post(path, json=body, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed"), origin
        assert "access-control-allow-origin" not in answer.headers
    assert setting.engine.seen == []
    for headers in ({}, {"Origin": "http://localhost:8000"}, {"Origin": "HTTP://LOCALHOST:8000"}):
        assert setting.client.post(path, json=body, headers=headers).status_code == 200


def test_a_page_is_the_servers_own_if_it_comes_from_the_name_that_was_asked(opened: Open) -> None:
    client = opened(hosts=["my.example"]).client
    for host, origin, status in (
        ("my.example", "https://my.example", 200),
        ("my.example", "http://localhost:8000", 403),
        ("localhost:8000", "https://my.example", 403),
    ):
        answer = client.post("/tokenize", json={"prompt": "the"}, headers={"Host": host, "Origin": origin})
        assert answer.status_code == status


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "MADEUP"])
def test_the_origin_counts_for_every_method_that_is_not_known_to_be_safe(setting: Any, method: str) -> None:
    answer = setting.client.request(method, "/v1/models", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert setting.client.request(method, "/v1/models").status_code == 405


def test_a_page_of_others_may_look_but_its_browser_shows_it_nothing(setting: Any) -> None:
    answer = setting.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


# What OpenAI's client in a page sends along.
HEADERS = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": HEADERS}


def test_pages_of_a_named_origin_may_ask_with_their_key(opened: Open) -> None:
    client = opened(origins=["https://Page.example/"], key="secret").client
    origin = {"Origin": "https://page.example"}
    before = client.options("/v1/completions", headers={**origin, **PREFLIGHT})
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in before.headers
    allowed = before.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    assert set(HEADERS.split(",")) <= set(allowed)
    answer = client.post(
        "/v1/completions", json={"prompt": "the"}, headers={**origin, "Authorization": "Bearer secret"}
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    refused = client.post("/v1/completions", json={"prompt": "the"}, headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
    other = client.options("/v1/completions", headers={"Origin": "https://evil.example", **PREFLIGHT})
    assert other.status_code == 400
    assert client.post("/tokenize", json={"prompt": "a"}, headers={"Origin": "https://evil.example"}).status_code == 403


def test_without_origins_there_is_no_preflight(setting: Any) -> None:
    answer = setting.client.options("/v1/completions", headers={"Origin": "https://page.example", **PREFLIGHT})
    assert answer.status_code == 405
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("path", [*LOOKS, *STATES])
@pytest.mark.parametrize(
    "given",
    [None, "Bearer", "Bearer wrong", "Bearer secre", "Bearer secret1", "Basic secret", "secret", "Bearer sécret"],
)
def test_every_route_but_the_open_ones_asks_for_the_key(opened: Open, path: str, given: str | None) -> None:
    setting = opened(key="secret")
    headers = {} if given is None else {"Authorization": given.encode()}
    method = "POST" if path in STATES else "GET"
    answer = setting.client.request(method, path, headers=headers, json={"prompt": "the"} if method == "POST" else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "secret" not in answer.text
    assert setting.engine.seen == []


@pytest.mark.parametrize("path", [*LOOKS, *OPEN])
def test_the_key_opens_every_route_and_the_open_ones_need_none(opened: Open, path: str) -> None:
    client = opened(key="secret").client
    expected = 404 if path == "/nowhere" else 200
    assert client.get(path, headers={"Authorization": "bearer secret"}).status_code == expected
    if path in OPEN:
        assert client.get(path).status_code == 200


def test_the_key_is_compared_in_constant_time(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(given: bytes, own: bytes) -> bool:
        compared.append((given, own))
        return True

    monkeypatch.setattr(guard, "compare_digest", compare)
    assert opened(key="secret").client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 200
    assert compared == [(b"x", b"secret")]


def test_a_key_given_twice_is_none(opened: Open) -> None:
    headers = [("Authorization", "Bearer secret"), ("Authorization", "Bearer secret")]
    assert opened(key="secret").client.get("/v1/models", headers=headers).status_code == 401


def chunks(*sizes: int) -> Iterator[bytes]:
    for size in sizes:
        yield b" " * size


def test_a_body_that_says_how_long_it_is_may_be_no_longer(opened: Open) -> None:
    setting = opened(max_body_bytes=1024)
    fits = json.dumps({"prompt": "the"}).encode().ljust(1024)
    json_type = {"Content-Type": "application/json"}
    assert setting.client.post("/v1/completions", content=fits, headers=json_type).status_code == 200
    answer = setting.client.post("/v1/completions", content=fits + b" ", headers=json_type)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"


Messages = list[dict[str, Any]]


async def passed(
    messages: Messages, headers: dict[str, str], *, most: int = 1024, app: Any = None
) -> tuple[Messages, Messages, list[bytes]]:
    """(what a guard over an app that reads its body sent, messages that it left unread, bodies that the app read)."""
    sent: Messages = []
    read: list[bytes] = []
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        read.append(message["body"])
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    rules = Rules(None, frozenset(["localhost"]), frozenset(), requests=2, body_bytes=most)
    scope = {
        "type": "http", "method": "POST", "path": "/x",
        "headers": [(key.lower().encode(), value.encode()) for key, value in {"host": "localhost", **headers}.items()],
    }  # fmt: skip
    await Guard(app or plain, rules=rules, metrics=Metrics())(scope, receive, send)
    return sent, left, read


def part(size: int, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "5"}, {"Content-Length": "-1"}, {"Content-Length": "many"}])
def test_the_bytes_that_come_are_counted_whatever_was_said(headers: dict[str, str]) -> None:
    sent, left, read = asyncio.run(passed([part(1000)] * 99, headers))
    assert sent[0]["status"] == 413
    assert len(left) == 97, "no more was read than it took to know"
    assert read == []


def test_a_body_in_pieces_arrives_whole() -> None:
    sent, _, read = asyncio.run(passed([part(1000), part(0), part(24, more=False)], {}))
    assert sent[0]["status"] == 200
    assert read == [b"x" * 1024]


def test_a_body_that_is_said_to_be_long_is_not_read_at_all() -> None:
    for length in ("1025", "9" * 5000):
        sent, left, _ = asyncio.run(passed([part(10, more=False)], {"Content-Length": length}))
        assert (sent[0]["status"], len(left)) == (413, 1)


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    sent, _, read = asyncio.run(passed([part(10)], {}))
    assert sent[0]["status"] == 408
    assert read == []


def test_a_client_that_goes_while_it_sends_is_no_request() -> None:
    sent, _, read = asyncio.run(passed([part(10), {"type": "http.disconnect"}], {}))
    assert (sent[0]["status"], read) == (400, [])


def test_a_chunked_body_over_http_is_counted(opened: Open) -> None:
    setting = opened(max_body_bytes=1024)
    answer = setting.client.post("/tokenize", content=chunks(600, 600), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_more_requests_at_once_than_can_wait_are_refused_unread() -> None:
    """A request beyond the limit is refused before its body is read; the others go on."""

    async def scene() -> None:
        rules = Rules(None, frozenset(["localhost"]), frozenset(), requests=2, body_bytes=99)
        release = asyncio.Event()
        statuses: list[int] = []
        bodies_read = 0

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def ask(method: str) -> None:
            async def receive() -> dict[str, Any]:
                nonlocal bodies_read
                bodies_read += method == "POST"
                return part(1, more=False)

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    if message["status"] == 429:
                        assert dict(message["headers"])[b"retry-after"] == b"2"

            scope = {"type": "http", "method": method, "path": "/x", "headers": [(b"host", b"localhost")]}
            await over(scope, receive, send)

        over = Guard(slow, rules=rules, metrics=Metrics())
        running = [asyncio.create_task(ask("POST")) for _ in range(2)]
        await asyncio.sleep(0)
        await ask("POST")
        assert statuses == [429]
        assert bodies_read == 2
        looking = asyncio.create_task(ask("GET"))  # whoever watches the server still can
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*running, looking)
        await ask("POST")
        assert statuses == [429, 200, 200, 200, 200]

    asyncio.run(scene())


def test_the_rules_follow_the_options() -> None:
    rules = rules_of(ServeOptions(slots=3, queue=5, max_body_bytes=2000), key="k", names=("laptop",))
    assert (rules.key, rules.body_bytes, rules.any_address) == ("k", 2000, False)
    assert rules.requests > 8
    assert "laptop" not in rules.hosts


def test_refusals_of_the_router_have_openais_shape(setting: Any) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        answer = setting.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert setting.client.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'"the"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000,
     b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "the", "model": "\\ud800"}'],
)  # fmt: skip
@pytest.mark.parametrize("path", STATES)
def test_a_body_that_is_no_request_is_400(setting: Any, path: str, body: bytes) -> None:
    answer = setting.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert setting.engine.seen == []


@pytest.mark.parametrize("path", STATES)
def test_a_body_that_is_not_sent_as_json_is_told_so(setting: Any, path: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for body, headers in ((b'{"prompt": "the"}', form), (b"[]", {"Content-Type": "application/json"})):
        error = setting.client.post(path, content=body, headers=headers).json()["error"]
        assert "Content-Type: application/json" in error["message"]
        assert error["param"] is None


def test_what_was_not_foreseen_tells_nothing_of_the_inside(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(setting.engine, "submit", fail, raising=False)
    answer = setting.client.post("/v1/completions", json={"prompt": "the"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/ping", "/", "/version", "/v1/models", "/metrics", "/openapi.json"]
)
def test_head_is_get_without_its_body(setting: Any, path: str) -> None:
    got, head = setting.client.get(path), setting.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_is_refused_where_get_is(opened: Open) -> None:
    client = opened(key="secret").client
    for path, headers, status in (
        ("/v1/models", {}, 401),
        ("/health", {"Host": "evil.example"}, 403),
        ("/nowhere", {"Authorization": "Bearer secret"}, 404),
        ("/v1/completions", {"Authorization": "Bearer secret"}, 405),
    ):
        answer = client.head(path, headers=headers)
        assert (answer.status_code, answer.content) == (status, b"")
    text = client.get("/metrics", headers={"Authorization": "Bearer secret"}).text
    assert 'route="none",method="HEAD",status="401"} 1' in text
