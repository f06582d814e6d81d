"""One self-contained HTML file: a frame, a look, data as JSON, scripts and plotly.js of the installed package.

    look.css, figures.js   of every page of charts
    a page's own files     beside its module

Its content security policy forbids every request and allows only the page's own scripts, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

Json = Mapping[str, Any]


def shared_source(name: str) -> str:
    """The text of a file that every page has: look.css or figures.js."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def self_contained(frame: str, data: Json, *, style: str, scripts: Sequence[str]) -> str:
    """The page as text; `scripts` run after plotly.js and figures.js, `style` comes after look.css."""
    scripts = [get_plotlyjs(), shared_source("figures.js"), *scripts]
    digests = (base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii") for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    style = f"<style>{shared_source('look.css')}{style}</style>"
    return filled(frame, data, policy=policy, style=style, scripts=[f"<script>{script}</script>" for script in scripts])


def filled(frame: str, data: Json, *, policy: str, style: str, scripts: Sequence[str]) -> str:
    """A frame with its holes filled; `style` and `scripts` are HTML."""
    # JSON that cannot end the script element that holds it, whatever a text in it says.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    holes = {
        "title": html.escape(data["title"]),
        "policy": policy,
        "style": style,
        "scripts": "\n".join([f'<script type="application/json" id="data">{text}</script>', *scripts]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: holes[match[1]], frame)
