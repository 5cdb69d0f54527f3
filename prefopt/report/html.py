"""Self-contained HTML from the templates in `page/`: styles, charts and data are inside the file.

Everything from a run is escaped by jinja2. A content security policy lets the browser run only the two scripts of the
page, named by their hashes, and load nothing: a text that slipped through would still do nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prefopt.report.versions import version_of
from prefopt.safety.redaction import redacted

_PAGE = Path(__file__).with_name("page")


def render(template: str, charts: Sequence[Any], **context: Any) -> str:
    """A page as text, without secrets.

    Args:
        template: a file of `page/`.
        charts: for the page's script: `prefopt.report.curves.as_data`.
        context: for the template.
    """
    library, script = _file("vendor/uPlot.iife.min.js"), _file("charts.js")
    # Before rendering: in the page itself, a change to a script would change its hash.
    clean = redacted(context)
    return _environment().get_template(template).render(
        charts=_json(redacted(list(charts))),
        library=Markup(library),
        script=Markup(script),
        script_hashes=Markup(f"{_hash(library)} {_hash(script)}"),
        style=Markup(_file("vendor/uPlot.min.css") + _file("style.css")),
        version=version_of("prefopt"),
        **clean,
    )  # fmt: skip


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _file(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _json(value: Any) -> Markup:
    """JSON that cannot end the script element it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
