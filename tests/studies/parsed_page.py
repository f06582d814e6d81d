"""A page as a browser would find it, and whether it keeps to itself."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

LOADING_ATTRIBUTES = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping"}


class Page(HTMLParser):
    """Elements with attributes, scripts (data, plotly.js, ours), styles and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = [""]
        self._open = self.text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = {"script": self.scripts, "style": self.styles}.get(tag, self.text)
        self._open.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self.text
        self.text.append("")

    def handle_data(self, data: str) -> None:
        self._open[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def check_nothing_is_loaded(page: Page) -> None:
    """No element or style asks for anything, and the policy allows the page's own scripts only."""
    for tag, attributes in page.elements:
        for name in LOADING_ATTRIBUTES & attributes.keys():
            assert str(attributes[name]).startswith("data:"), (tag, attributes)
        assert "url(" not in str(attributes.get("style"))
    assert all("url(" not in style and "@import" not in style for style in page.styles)
    # Plotly's own text names sites it could link to; ours names none, and the policy forbids every request.
    data, plotly, *ours = page.scripts
    assert "plotly.js v" in plotly[:200]
    assert "://" not in "".join(ours) + data
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    scripts = directives.pop("script-src").split()
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (plotly, *ours)]
    assert scripts == [f"'sha256-{digest}'" for digest in digests]
    assert directives == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data: blob:"}
