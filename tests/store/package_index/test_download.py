"""The pinned file comes from an index as pip finds it: through cuts, redirects and strange pages, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.store.package_index.conftest import CONTENT, WANTED, Handler, Index

from octavo.store.package_index import download
from octavo.store.package_index.client import FetchError
from octavo.store.package_index.download import fetch
from octavo.store.package_index.settings import Settings

FILE = f"/files/{WANTED.filename}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting between tries, and nothing of this machine's network settings."""
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def settings(index: Index, *more: str, timeout: float = 5.0) -> Settings:
    return Settings(indexes=(f"{index.url}/simple", *more), timeout_seconds=timeout)


def fetched(tmp_path: Path, configured: Settings) -> list[int]:
    """Fetches into tmp_path and checks the content; returns the values passed to progress."""
    seen: list[int] = []
    fetch(WANTED, tmp_path / "model.whl", configured, progress=seen.append)
    assert (tmp_path / "model.whl").read_bytes() == CONTENT
    assert not (tmp_path / "model.whl.part").exists()
    return seen


def refused(tmp_path: Path, configured: Settings) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(WANTED, tmp_path / "model.whl", configured, progress=lambda _: None)
    assert not (tmp_path / "model.whl").exists()
    return str(caught.value)


def test_the_file_is_found_and_progress_ends_at_its_size(index: Index, tmp_path: Path) -> None:
    seen = fetched(tmp_path, settings(index))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(CONTENT))
    page, headers = index.requests[0]
    assert page == "/simple/some-model/"
    assert "application/vnd.pypi.simple.v1+json" in headers["Accept"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_index_may_end_in_a_slash(index: Index, tmp_path: Path, slash: str) -> None:
    fetched(tmp_path, Settings(indexes=(f"{index.url}/simple{slash}",)))


@pytest.mark.parametrize(
    "page",
    [
        f'<base href="/files/"><a href="{WANTED.filename}">x</a>',
        f'<A HREF=/files/{WANTED.filename}#sha256={WANTED.sha256}&egg=x data-yanked="old">x</A>',
        f'<a>none</a><a href="http://[bad/">x</a><a href="/files/other.whl">x</a><a href="{FILE}#md5=0">x</a>',
        f'<a href="{FILE.replace("-1.0-", "%2D1.0%2D")}">x</a>',
    ],
    ids=["base", "unquoted", "others", "quoted"],
)
def test_html_pages_in_common_variants(index: Index, tmp_path: Path, page: str) -> None:
    index.page(page)
    index.answers[FILE.replace("-1.0-", "%2D1.0%2D")] = index.answers[FILE]
    fetched(tmp_path, settings(index))


def test_a_json_page(index: Index, tmp_path: Path) -> None:
    files = [{"filename": "other.whl", "url": "x", "hashes": {}}]
    files += [{"filename": WANTED.filename, "url": f"../..{FILE}", "hashes": {"sha256": WANTED.sha256}}]
    index.page(json.dumps({"files": files}), "application/vnd.pypi.simple.v1+json")
    fetched(tmp_path, settings(index))


@pytest.mark.parametrize("text", ["[1]", "{", '{"files": [1]}', "[" * 100_000, '{"files": {"a": 1}}'])
def test_an_invalid_json_page(index: Index, tmp_path: Path, text: str) -> None:
    index.page(text, "application/vnd.pypi.simple.v1+json")
    assert "not that of a package index" in refused(tmp_path, settings(index))


def test_a_broken_download_resumes_where_it_ended(index: Index, tmp_path: Path) -> None:
    index.cut(after=30_000, times=3)
    fetched(tmp_path, settings(index))
    assert index.ranges() == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_a_silent_server_is_given_up_and_a_later_call_resumes(index: Index, tmp_path: Path) -> None:
    index.cut(after=50_000, times=1)
    whole = index.answers[FILE]
    index.answers[FILE] = lambda handler: (
        whole(handler) if len(index.ranges()) == 1 else handler.send(503, b"", Connection="close")
    )
    assert "HTTP 503" in refused(tmp_path, settings(index))
    assert (tmp_path / "model.whl.part").stat().st_size == 50_000
    assert len(index.ranges()) == 1 + download.ATTEMPTS
    index.file()
    assert fetched(tmp_path, settings(index))[0] == 50_000


def test_a_server_without_range_support_sends_the_whole_file(index: Index, tmp_path: Path) -> None:
    (tmp_path / "model.whl.part").write_bytes(b"\0" * 999)
    index.file(ranges=False)
    assert fetched(tmp_path, settings(index))[0] == 0


@pytest.mark.parametrize("left", [b"\1" * 999, CONTENT + b"x", b"\1" * len(CONTENT), CONTENT], ids=len)
def test_a_partial_file_is_used_only_if_the_result_is_correct(index: Index, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "model.whl.part").write_bytes(left)
    fetched(tmp_path, settings(index))
    assert (index.ranges() == []) == (left == CONTENT)


def test_a_wrong_range_is_rejected(index: Index, tmp_path: Path) -> None:
    (tmp_path / "model.whl.part").write_bytes(CONTENT[:100])
    whole = index.answers[FILE]

    def answer(handler: Handler) -> None:
        if "Range" in handler.headers:
            handler.send(206, CONTENT[50:], Content_Range=f"bytes 50-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            whole(handler)

    index.answers[FILE] = answer
    fetched(tmp_path, settings(index))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\1" * len(CONTENT), "SHA-256 differs"), (CONTENT + b"x", "more than"), (CONTENT[:-1], "fewer than")],
    ids=["other", "longer", "shorter"],
)
def test_a_wrong_file_is_refused_and_removed(index: Index, tmp_path: Path, content: bytes, message: str) -> None:
    index.file(content)
    assert message in refused(tmp_path, settings(index))


def test_an_index_that_lists_another_hash_is_skipped(index: Index, tmp_path: Path) -> None:
    index.page(f'<a href="{FILE}#sha256={"0" * 64}">x</a>')
    assert "another SHA-256" in refused(tmp_path, settings(index))
    assert index.ranges() == []


def test_the_next_index_is_tried_and_all_failures_are_reported(index: Index, tmp_path: Path) -> None:
    index.page("<html></html>", path="/empty/some-model/")
    configured = Settings(indexes=(f"{index.url}/none", f"{index.url}/empty", f"{index.url}/simple"))
    fetched(tmp_path, configured)
    (tmp_path / "model.whl").unlink()
    message = refused(tmp_path, Settings(indexes=configured.indexes[:2]))
    assert "HTTP 404" in message
    assert "does not list" in message


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_pages_are_relative_to_where_they_came_from(
    index: Index, tmp_path: Path, code: int
) -> None:
    index.answers["/simple/some-model/"] = lambda handler: handler.send(code, b"", Location="/a/b/")
    index.page(f'<a href="c/{WANTED.filename}">x</a>', path="/a/b/")
    index.answers[f"/a/b/c/{WANTED.filename}"] = lambda handler: handler.send(code, b"", Location=FILE)
    fetched(tmp_path, settings(index))


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[bad", "/simple/some-model/"])
def test_endless_or_unsafe_redirects_are_an_error(index: Index, tmp_path: Path, to: str) -> None:
    index.answers["/simple/some-model/"] = lambda handler: handler.send(302, b"", Location=to)
    refused(tmp_path, settings(index))


def test_a_password_is_sent_to_its_host_only_and_never_shown(index: Index, tmp_path: Path) -> None:
    """Another name of the same machine is another host: a redirect there sends no password."""
    elsewhere = f"http://localhost:{index.port}"
    index.page(f'<a href="{elsewhere}{FILE}">x</a>')
    with_password = f"http://us%40er:s%3Acret@127.0.0.1:{index.port}/simple"
    fetched(tmp_path, Settings(indexes=(with_password,)))
    sent = {path: headers.get("Authorization") for path, headers in index.requests}
    assert sent == {"/simple/some-model/": "Basic dXNAZXI6czpjcmV0", FILE: None}
    (tmp_path / "model.whl").unlink()
    for code in (401, 403, 302):
        index.answers["/simple/some-model/"] = lambda handler, code=code: handler.send(  # type: ignore[misc]
            code, b"", Location=f"{elsewhere}/moved/"
        )
        message = refused(tmp_path, Settings(indexes=(with_password,)))
        assert "cret" not in message
        assert "us" not in message.replace("wants a user", "")
    assert index.requests[-1][0] == "/moved/"
    assert "Authorization" not in index.requests[-1][1]


def test_a_password_comes_from_netrc(index: Index, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password it\n")
    fetched(tmp_path, settings(index))
    assert {headers.get("Authorization") for _, headers in index.requests} == {"Basic bWU6aXQ="}


@pytest.mark.parametrize(
    "url",
    ["http://me:cret@host:port/simple", "http://me:cret@[bad/simple", "ftp://me:cret@host/", "me:cret@host", "http://me:cret@"],
)  # fmt: skip
def test_the_error_of_an_invalid_url_does_not_show_its_password(tmp_path: Path, url: str) -> None:
    assert "cret" not in refused(tmp_path, Settings(indexes=(url,)))


def test_a_proxy_is_used_unless_no_proxy_lists_the_host(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy is the index server itself: it gets "GET http://host/path"."""
    for path in list(index.answers):
        index.answers[f"http://elsewhere.invalid{path}"] = index.answers[path]
    configured = Settings(indexes=("http://elsewhere.invalid/simple",), proxy=f"me:it@127.0.0.1:{index.port}")
    fetched(tmp_path, configured)
    assert all(headers["Proxy-Authorization"] == "Basic bWU6aXQ=" for _, headers in index.requests)
    monkeypatch.setenv("NO_PROXY", "elsewhere.invalid")
    (tmp_path / "model.whl").unlink()
    refused(tmp_path, configured)
    monkeypatch.setenv("NO_PROXY", "other.invalid")
    monkeypatch.setenv("HTTP_PROXY", index.url)
    fetched(tmp_path, Settings(indexes=configured.indexes))


def test_the_error_of_an_unsupported_proxy_does_not_show_its_password(tmp_path: Path) -> None:
    message = refused(
        tmp_path, Settings(indexes=("https://host.invalid/simple",), proxy="socks5://me:cret@127.0.0.1:1")
    )
    assert "socks5 proxy" in message
    assert "cret" not in message


def test_a_server_that_does_not_respond_is_given_up(index: Index, tmp_path: Path) -> None:
    import threading

    ended = threading.Event()
    index.answers["/simple/some-model/"] = lambda handler: (ended.wait(20), None)[1]
    try:
        assert "no answer in time" in refused(tmp_path, settings(index, timeout=0.05))
    finally:
        ended.set()


def test_folders_and_pages_of_find_links_come_first(index: Index, tmp_path: Path) -> None:
    (links := tmp_path / "links").mkdir()
    (links / WANTED.filename).write_bytes(CONTENT)
    for place in (str(links), links.as_uri(), str(links / WANTED.filename)):
        fetched(tmp_path, Settings(indexes=(), find_links=(str(tmp_path / "absent"), place)))
        (tmp_path / "model.whl").unlink()
    index.page(f'<a href="{FILE}">x</a>', path="/links")
    fetched(tmp_path, Settings(indexes=(), find_links=(f"{index.url}/links",)))
    (tmp_path / "model.whl").unlink()
    (links / WANTED.filename).write_bytes(b"other")
    assert "SHA-256" in refused(tmp_path, Settings(indexes=(), find_links=(str(links),)))
    assert "no index" in refused(tmp_path, Settings(indexes=()))


def test_an_index_may_be_a_folder(tmp_path: Path) -> None:
    (page := tmp_path / "simple" / "some-model").mkdir(parents=True)
    (tmp_path / WANTED.filename).write_bytes(CONTENT)
    (page / "index.html").write_text(f'<a href="../../{WANTED.filename}">x</a>')
    fetched(tmp_path, Settings(indexes=((tmp_path / "simple").as_uri(),)))
