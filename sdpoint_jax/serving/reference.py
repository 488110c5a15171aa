"""The page `/docs`: the routes of the service, from its OpenAPI description. It needs no script and no network."""

import html
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: routes</title>
<link rel="icon" href="data:,">
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; margin: 0 auto; max-width: 56rem; padding: 1rem; }}
  section {{ border: 1px solid #8888; border-radius: .6rem; margin: 1rem 0; padding: 0 1rem; overflow-x: auto; }}
  h2 {{ font: bold 1rem monospace; }} table {{ border-collapse: collapse; }}
  td, th {{ border-bottom: 1px solid #8884; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><a href="openapi.json">openapi.json</a> describes the same for programs.</p>
{routes}
</body>
</html>
"""


def page(description: dict[str, Any]) -> str:
    """Return the page for an OpenAPI description."""
    routes = [
        _route(f"{method.upper()} {path}", operation)
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    ]
    return _PAGE.format(title=html.escape(description["info"]["title"]), routes="\n".join(routes))


def _route(name, operation):
    parts = [f"<section><h2>{html.escape(name)}</h2><p>{html.escape(operation.get('description', ''))}</p>"]
    if parameters := operation.get("parameters"):
        rows = [_row(item["name"], item["schema"], item.get("required")) for item in parameters]
        parts.append(f"<table><tr><th>parameter</th><th>type</th><th></th></tr>{''.join(rows)}</table>")
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        parts.append(f"<p>Body: {html.escape(', '.join(content))}</p>")
    for properties in (body["schema"].get("properties") for body in content.values()):
        if properties:
            rows = [_row(name, schema, False) for name, schema in properties.items()]
            parts.append(f"<table><tr><th>in the body</th><th>type</th><th></th></tr>{''.join(rows)}</table>")
    return "".join(parts) + "</section>"


def _row(name, schema, required):
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "maxLength": "characters ≤"}
    limits = [f"{sign} {kind[key]:g}" for kind in kinds for key, sign in bounds.items() if key in kind]
    notes = [schema.get("description", "")]
    if schema.get("default") is not None:
        notes.append(f"Default: {schema['default']}.")
    cells = (
        name + (" (required)" if required else ""),
        " ".join([*(kind.get("type", "") for kind in kinds), *limits]),
        " ".join(notes),
    )
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
