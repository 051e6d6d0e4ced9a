"""The page of the REST interface at /docs, made from its OpenAPI document: plain HTML that needs no script and nothing from elsewhere.

Its looks are in `envoy/docs/style.css`.
"""

import json
import re
import shlex
from collections.abc import Iterator
from html import escape
from typing import Any

Json = dict[str, Any]
HOST = "https://localhost:8443"
LINE = 80
"""Characters of a body that is shown in one line."""
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_CODE = re.compile(r"`(.+?)`")
# What a schema's keywords are called in the column of rules.
RULES = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "length at least {}",
    "maxLength": "length at most {}",
    "minItems": "number at least {}",
    "maxItems": "number at most {}",
    "pattern": "pattern <code>{}</code>",
}
BOUNDS_OF_TYPES = (-(2**31), 2**31 - 1, -(2**63), 2**63 - 1)
"""They say nothing that the type does not say."""


def page(document: Json) -> str:
    """The whole page."""
    operations = list(_operations(document))
    info, schemas = document["info"], document["components"]["schemas"]
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{escape(info["title"])}: REST reference</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="stylesheet" href="/docs/style.css"></head>',
        "<body>",
        "<nav>",
        f'<a class="title" href="#top">{escape(info["title"])} {escape(info["version"])}</a>',
    ]
    for tag in document["tags"]:
        parts.append(f'<a class="tag" href="#{tag["name"]}">{escape(tag["name"])}</a>')
        parts += [
            f'<a href="#{operation["operationId"]}">{_method(method)} {escape(operation["operationId"])}</a>'
            for method, _, operation in operations
            if tag["name"] in operation["tags"]
        ]
    parts += ['<a class="tag" href="#reasons">Reasons of errors</a>', '<a class="tag" href="#objects">Objects</a>']
    parts += [f'<a href="#{name}">{escape(name)}</a>' for name in schemas]
    parts += [
        "</nav>",
        '<main id="top">',
        f"<h1>{escape(info['title'])}: REST reference</h1>",
        f'<p>{escape(info["summary"])} For programs: <a href="/openapi.json">/openapi.json</a> (OpenAPI {document["openapi"]}).</p>',
        _text(info["description"]),
        f"<p>In the examples: <code>GENMESH={HOST}</code>, and <code>TOKEN</code> is an access token. "
        "A star marks what has to be there in a request, and what always is in an answer.</p>",
    ]
    for tag in document["tags"]:
        parts += [f'<h2 id="{tag["name"]}">{escape(tag["name"])}</h2>', _text(tag["description"])]
        parts += [_operation(document, *one) for one in operations if tag["name"] in one[2]["tags"]]
    parts += ['<h2 id="reasons">Reasons of errors</h2>', _text(schemas["ErrorReason"]["description"])]
    parts.append('<h2 id="objects">Objects</h2>')
    parts += [f'<section id="{name}"><h3>{escape(name)}</h3>{_schema(schema)}</section>' for name, schema in schemas.items()]
    return "\n".join([*parts, "</main>", "</body>", "</html>", ""])


def _operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _operation(document: Json, method: str, path: str, operation: Json) -> str:
    name = operation["operationId"]
    parts = [
        f'<article id="{name}">',
        f'<h3><a href="#{name}">{_method(method)} <code>{escape(path)}</code></a> <small>{escape(name)}</small></h3>',
        _text(operation["description"]),
        f'<p class="access">{_access(operation["security"])}</p>',
    ]
    if parameters := operation.get("parameters"):
        rows = [
            (
                f"<code>{escape(one['name'])}</code> <small>in the {one['in']}</small>",
                one["schema"],
                bool(one.get("required")),
                one["description"],
            )
            for one in parameters
        ]
        parts += ["<h4>Parameters</h4>", _table(rows)]
    body, answer = operation.get("requestBody", {}).get("content", {}), operation["responses"]["200"]["content"]
    if "application/json" in body:
        schema = body["application/json"]["schema"]
        parts += [f"<h4>Body: {_type(schema)}</h4>", _schema(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])]
    elif body:
        parts += ["<h4>Body</h4>", _text(operation["requestBody"]["description"])]
    parts += [f"<pre>{escape(_curl(method, path, operation))}</pre>", f"<h4>Answer: {_type(answer['application/json']['schema'])}</h4>"]
    if "text/event-stream" in answer:
        parts.append(_text(operation["responses"]["200"]["description"].rpartition("\n\n")[2]))
    example = json.dumps(answer["application/json"]["example"], indent=2, ensure_ascii=False)
    parts.append(f"<details><summary>Example of an answer</summary><pre>{escape(example)}</pre></details>")
    rows = []
    for status, response in operation["responses"].items():
        if status != "200":
            shared = document["components"]["responses"].get(response.get("$ref", "").rpartition("/")[2])
            rows.append(f"<tr><td>{status}</td><td>{_text((shared or response)['description'])}</td></tr>")
    parts.append(f"<details><summary>Refusals</summary><table>{''.join(rows)}</table></details>")
    return "\n".join([*parts, "</article>"])


def _access(security: list[Json]) -> str:
    if not security:
        return "For everybody: no token is needed."
    roles, keys = security[0]["bearerAuth"], next((one["apiKeyAuth"] for one in security if "apiKeyAuth" in one), None)
    who = f"For people with the role <code>{escape(roles[0])}</code>" if roles else "For everybody who is signed in"
    if roles == ["operator"]:
        who += " or <code>admin</code>"
    return f"{who}; API keys {'cannot do this' if keys is None else f'with the scope <code>{escape(keys[0])}</code>'}."


def _curl(method: str, path: str, operation: Json) -> str:
    for one in operation.get("parameters", []):
        if one["in"] == "path":
            path = path.replace(f"{{{one['name']}}}", str(one["example"]))
    streaming = "text/event-stream" in operation["responses"]["200"]["content"]
    lines = [f'curl {"-N " if streaming else ""}{f"-X {method} " if method not in ("GET", "POST") else ""}"$GENMESH{path}"']
    if operation["security"]:
        lines.append('-H "authorization: Bearer $TOKEN"')
    if streaming:
        lines.append("-H 'accept: text/event-stream'")
    body = operation.get("requestBody", {}).get("content", {})
    if "application/json" in body:
        example = json.dumps(body["application/json"]["example"])
        if len(example) > LINE:
            example = json.dumps(body["application/json"]["example"], indent=2)
        lines += ["-H 'content-type: application/json'", f"-d {shlex.quote(example)}"]
    elif body:
        lines.append("--data-binary @FILE")
    elif method == "POST":
        lines[0] = lines[0].replace("curl ", "curl -X POST ")
    return " \\\n  ".join(lines)


def _schema(schema: Json) -> str:
    required = schema.get("required", [])
    rows = [
        (f"<code>{escape(name)}</code>", one, name in required, one.get("description", ""))
        for name, one in schema.get("properties", {}).items()
    ]
    choices = [one["required"][0] for one in schema.get("oneOf", ()) if "required" in one]
    text = _text(schema.get("description", ""))
    if choices:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in choices)
        text += f"<p>{'At most' if any('not' in one for one in schema['oneOf']) else 'Exactly'} one of: {names}.</p>"
    return text + (_table(rows) if rows else "")


def _table(rows: list[tuple[str, Json, bool, str]]) -> str:
    star = '<b title="always there">*</b>'
    cells = [
        f"<tr><td>{name}{star if required else ''}</td><td>{_type(schema)}</td><td>{_text(text)}{_rules(schema)}</td></tr>"
        for name, schema, required, text in rows
    ]
    return f"<table>{''.join(cells)}</table>"


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{escape(name)}</a>'
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return escape(" or ".join(kinds) + (f" ({schema['format']})" if "format" in schema else ""))


def _rules(schema: Json) -> str:
    found = [text.format(escape(str(schema[key]))) for key, text in RULES.items() if key in schema and schema[key] not in BOUNDS_OF_TYPES]
    if schema.get("format") == "int64":
        found = [rule for rule in found if not rule.startswith("pattern")]
    if "enum" in schema:
        found.append(" or ".join(f"<code>{escape(value)}</code>" for value in schema["enum"]))
    if schema.get("uniqueItems"):
        found.append("none twice")
    if excluded := schema.get("not", schema.get("items", {}).get("not")):
        found.append("not " + ", ".join(f"<code>{escape(value)}</code>" for value in excluded["enum"]))
    return f'<p class="rules">{"; ".join(found)}</p>' if found else ""


def _method(method: str) -> str:
    return f'<span class="method {method.lower()}">{method}</span>'


def _text(text: str) -> str:
    """Paragraphs, lists, **bold** and `code`: all that comments use."""
    blocks: list[str] = []
    for block in filter(None, text.strip().split("\n\n")):
        marked = _CODE.sub(r"<code>\1</code>", _BOLD.sub(r"<b>\1</b>", escape(block, quote=False)))
        if marked.startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{line.removeprefix('- ')}</li>" for line in marked.split("\n")) + "</ul>")
        else:
            blocks.append(f"<p>{marked}</p>")
    return "".join(blocks)
