"""/docs: renders the OpenAPI schema as one HTML page without external resources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from octavo.html_report.elements import POLICY, STYLE
from octavo.server.unsupported import REJECTED_MARK

Schema = Mapping[str, Any]

LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
EXAMPLES: Mapping[str, Schema] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 64},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
CODE = "code { font: .85rem ui-monospace, monospace; } td { vertical-align: top; }"


def reference_page(schema: Schema, address: str) -> str:
    """The HTML page of an OpenAPI schema. `address` is the server's URL, used in the curl examples."""
    info = schema["info"]
    routes = [
        _route(path, method, operation, schema, address.rstrip("/"))
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{info['title']} {info['version']}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{CODE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(info.get("description", ""))} The schema: <a href="openapi.json">openapi.json</a>.'
        "</p>\n" + "\n".join(routes) + "\n</body>\n</html>\n"
    )


def _route(path: str, method: str, operation: Schema, schema: Schema, address: str) -> str:
    text = operation.get("description") or operation.get("summary") or ""
    html = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>", f"<p>{escape(text)}</p>"]
    if needs_key := bool(operation.get("security")):
        html.append("<p>Needs the server's key: <code>Authorization: Bearer KEY</code>.</p>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        html += [_fields(model, schema) for model in _models(body, schema)]
        html.append(_example(address + path, EXAMPLES.get(path), needs_key))
    return "<section>\n" + "\n".join(part for part in html if part) + "\n</section>"


def _example(url: str, body: Schema | None, needs_key: bool) -> str:
    if body is None:
        return ""
    key = ' \\\n  -H "Authorization: Bearer KEY"' if needs_key else ""
    command = f"curl {url} \\\n  -H 'Content-Type: application/json'{key} \\\n  -d '{json.dumps(body)}'"
    return f'<div class="card"><pre>{escape(command)}</pre></div>'


def _models(body: Schema, schema: Schema) -> Iterator[Schema]:
    """The object schemas of a body: one, or the members of a union."""
    body = _resolved(body, schema)
    for model in body.get("anyOf", [body]):
        yield _resolved(model, schema)


def _fields(model: Schema, schema: Schema) -> str:
    """The table of the supported fields of `model`, and a collapsed table of the rejected ones."""
    fields = {name: _resolved(field, schema) for name, field in model.get("properties", {}).items()}
    rejected = {name: field for name, field in fields.items() if field.get(REJECTED_MARK)}
    supported_table = _table({name: field for name, field in fields.items() if name not in rejected}, model, schema)
    if not rejected:
        return supported_table
    summary = f"{len(rejected):,} fields of other servers that are rejected unless their value has no effect"
    return f"{supported_table}\n<details><summary>{summary}</summary>\n{_table(rejected, model, schema)}\n</details>"


def _table(fields: Mapping[str, Schema], model: Schema, schema: Schema) -> str:
    required = model.get("required", ())
    rows = []
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in required):
        default = "required" if name in required else json.dumps(field.get("default"))
        cells = [f"<code>{escape(name)}</code>", escape(_kind(field, schema)), escape(default)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, escape(field.get("description", ""))]))
    head = "<tr><th>field</th><th>type</th><th>default</th><th></th></tr>"
    return f'<div class="card"><table>\n{head}\n{"".join(rows)}\n</table></div>' if rows else ""


def _kind(field: Schema, schema: Schema) -> str:
    """Type and bounds of a field as text."""
    field = _resolved(field, schema)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(choice, schema) for choice in choices))
    if "enum" in field or "const" in field:
        return " or ".join(map(json.dumps, field.get("enum", [field.get("const")])))
    kind = field.get("type", "any")
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}), schema)}"
    elif kind == "object" and (names := field.get("properties")):
        kind = f"object of {', '.join(names)}"
    bounds = [phrase.format(f"{field[name]:,}") for name, phrase in LIMITS.items() if name in field]
    return f"{kind}, {', '.join(bounds)}" if bounds else str(kind)


def _resolved(field: Schema, schema: Schema) -> Schema:
    """The schema that a `$ref` points to, updated with the keys next to it; any other schema unchanged."""
    if "$ref" not in field:
        return field
    target: Any = schema
    for name in field["$ref"].removeprefix("#/").split("/"):
        target = target[name]
    return {**target, **{key: value for key, value in field.items() if key != "$ref"}}
