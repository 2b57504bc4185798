"""/docs: contains everything in openapi.json and loads no external resources."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from typing import Any

from octavo.server.reference import reference_page

OpenServer = Callable[..., Any]


class Page(HTMLParser):
    """Tags, text and URLs of an HTML page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_has_all_routes_and_fields_and_no_external_resources(server: Any) -> None:
    response = server.client.get("/docs")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page, schema = Page(response.text), server.client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in response.text
    for name in ("CompletionRequest", "ChatRequest"):
        for field in schema["components"]["schemas"][name]["properties"]:
            assert f"<code>{field}</code>" in response.text
    assert page.addresses == ["openapi.json"]
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "GET /docs" in server.client.get("/").json()["routes"]


def test_the_examples_are_valid_requests(open_server: OpenServer) -> None:
    server = open_server(key="secret")
    page = server.client.get("/docs", headers={"Authorization": "Bearer secret"})
    examples = re.findall(r"curl http://localhost:8000(/\S+) .*?-d &#x27;(.*?)&#x27;</pre>", page.text, re.DOTALL)
    assert {path for path, _ in examples} >= {"/v1/completions", "/v1/chat/completions", "/tokenize"}
    assert page.text.count("-H &quot;Authorization: Bearer KEY&quot;") == len(examples)
    for path, body in examples:
        sent = server.client.post(path, json=json.loads(unescape(body)), headers={"Authorization": "Bearer secret"})
        assert sent.status_code == 200, sent.text
    assert server.client.get("/docs").status_code == 401


def test_supported_fields_come_first_and_rejected_ones_are_collapsed(server: Any) -> None:
    html = server.client.get("/docs").text
    section = html[html.index("POST /v1/completions") :]
    supported, rejected = (
        section.index("<code>prompt</code>"),
        section.index("fields of other servers that are rejected"),
    )
    assert supported < section.index("<code>temperature</code>") < rejected < section.index("<code>mirostat</code>")


def test_types_and_bounds_are_text() -> None:
    fields = {
        "n": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 2048}, {"type": "null"}]},
        "stop": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 4, "default": []},
        "role": {"enum": ["user", "tool"]},
        "inner": {"$ref": "#/components/schemas/Inner", "description": "<b>bold</b> & more"},
    }
    schema = {
        "info": {"title": "t", "version": "1"},
        "components": {"schemas": {"Inner": {"type": "object", "properties": {"a": {}, "b": {}}}}},
        "paths": {"/x": {"post": {"requestBody": {"content": {"application/json": {
            "schema": {"type": "object", "properties": fields, "required": ["n"]}
        }}}}}},
    }  # fmt: skip
    html = reference_page(schema, "http://h")
    words = Page(html).words
    assert "nintegerat least" not in words
    assert "ninteger, at least 1, at most 2,048 or nullrequired" in words
    assert "stoplist of string, at most 9 characters, at most 4 items[]" in words
    assert 'role"user" or "tool"null' in words
    assert "innerobject of a, bnull<b>bold</b> & more" in words
    assert "<b>" not in html
