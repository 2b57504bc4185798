"""/docs: the OpenAPI schema as one page that a browser reads without loading anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from octavo.html_report import POLICY, STYLE
from octavo.server.unsupported import REFUSED_MARK

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
    """The page of an OpenAPI schema; `address` is the server's, as in http://127.0.0.1:8000, for the examples."""
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
    told = operation.get("description") or operation.get("summary") or ""
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>", f"<p>{escape(told)}</p>"]
    if needs_key := bool(operation.get("security")):
        parts.append("<p>Needs the server's key: <code>Authorization: Bearer KEY</code>.</p>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        parts += [_fields(form, schema) for form in _forms(body, schema)]
        parts.append(_example(address + path, EXAMPLES.get(path), needs_key))
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _example(url: str, body: Schema | None, needs_key: bool) -> str:
    if body is None:
        return ""
    key = ' \\\n  -H "Authorization: Bearer KEY"' if needs_key else ""
    command = f"curl {url} \\\n  -H 'Content-Type: application/json'{key} \\\n  -d '{json.dumps(body)}'"
    return f'<div class="card"><pre>{escape(command)}</pre></div>'


def _forms(body: Schema, schema: Schema) -> Iterator[Schema]:
    """The objects that a body may be."""
    body = _resolved(body, schema)
    for form in body.get("anyOf", [body]):
        yield _resolved(form, schema)


def _fields(form: Schema, schema: Schema) -> str:
    """The table of a form's fields, and a closed one of those that are refused."""
    fields = {name: _resolved(field, schema) for name, field in form.get("properties", {}).items()}
    refused = {name: field for name, field in fields.items() if field.get(REFUSED_MARK)}
    own = _table({name: field for name, field in fields.items() if name not in refused}, form, schema)
    if not refused:
        return own
    summary = f"{len(refused):,} fields of other servers that are refused unless they change nothing"
    return f"{own}\n<details><summary>{summary}</summary>\n{_table(refused, form, schema)}\n</details>"


def _table(fields: Mapping[str, Schema], form: Schema, schema: Schema) -> str:
    required = form.get("required", ())
    rows = []
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in required):
        default = "required" if name in required else json.dumps(field.get("default"))
        cells = [f"<code>{escape(name)}</code>", escape(_kind(field, schema)), escape(default)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, escape(field.get("description", ""))]))
    head = "<tr><th>field</th><th>type</th><th>default</th><th></th></tr>"
    return f'<div class="card"><table>\n{head}\n{"".join(rows)}\n</table></div>' if rows else ""


def _kind(field: Schema, schema: Schema) -> str:
    """A field's type and bounds in words."""
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
    bounds = [words.format(f"{field[name]:,}") for name, words in LIMITS.items() if name in field]
    return f"{kind}, {', '.join(bounds)}" if bounds else str(kind)


def _resolved(field: Schema, schema: Schema) -> Schema:
    """The schema that a `$ref` names, with what stands beside it."""
    if "$ref" not in field:
        return field
    found: Any = schema
    for name in field["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return {**found, **{key: value for key, value in field.items() if key != "$ref"}}
