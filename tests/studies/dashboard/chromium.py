"""Headless Chromium over the DevTools protocol, for tests: a small client of the pipe (file descriptors 3 and 4).

Messages are JSON, each ended by a NUL byte; commands have an id, events have none. No port is opened and no library
is needed. `Tab.problems` collects console errors, uncaught exceptions and failed requests.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Longer than any pause of a noisy machine; only a hang reaches it.
PATIENCE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = """--headless=new --remote-debugging-pipe --no-sandbox --no-first-run --disable-gpu --disable-dev-shm-usage
    --disable-extensions --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars
    --force-color-profile=srgb --mute-audio"""
# Nothing but this machine exists, whatever a page asks for.
ARGUMENTS = (*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
# A page asks its server every two seconds; in a test the pause is shorter.
HURRY = "const later = setTimeout; window.setTimeout = (f, ms, ...rest) => later(f, ms >= 1000 ? 100 : ms, ...rest);"


def find_chromium() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser; use it as a context manager."""

    def __init__(self, path: str, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._last_id = 0
        self._buffer = b""
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser expects its pipe at 3 and 4; dash accepts no file descriptor above 9, but it opens files.
        shell = f'exec "$0" "$@" 3</dev/fd/{to_browser} 4>/dev/fd/{from_browser}'
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", shell, path, *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)

    def send(self, method: str, session: str = "", **parameters: Any) -> Any:
        """Send a command and wait for its answer; events that arrive meanwhile are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + PATIENCE_S
        while (answer := self._receive(deadline)).get("id") != self._last_id:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium gave no answer within {PATIENCE_S} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("Chromium ended")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, url: str, *, dark: bool = False) -> Tab:
        """A new tab that has loaded `url`."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.send(f"{domain}.enable")
        tab.send("Emulation.setDeviceMetricsOverride", width=1440, height=1000, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        tab.send("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)


@dataclass
class Tab:
    """A page in the browser."""

    browser: Chromium
    target: str
    session: str
    _seen: list[str] = field(default_factory=list)

    def send(self, method: str, **parameters: Any) -> Any:
        """A command to this tab."""
        return self.browser.send(method, self.session, **parameters)

    def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; an exception in it fails."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(f"{expression}: {details.get('exception', details).get('description', details)}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.value(f"!!({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {PATIENCE_S} s: {condition}; problems: {self.problems()}")
            time.sleep(0.02)

    def problems(self) -> list[str]:
        """Console errors, uncaught exceptions, log entries of level error, and failed requests so far."""
        self.value("0")
        for event in self.browser.events:
            if event.get("sessionId") == self.session and (text := _problem(event["method"], event["params"])):
                self._seen.append(text)
        self.browser.events = [e for e in self.browser.events if e.get("sessionId") != self.session]
        return self._seen

    def mouse(self, kind: str, x: float, y: float) -> None:
        """One mouse event: pressed, moved or released, in CSS pixels of the window."""
        buttons = {"button": "none" if kind == "moved" else "left", "buttons": 0 if kind == "released" else 1}
        event = {"type": f"mouse{kind.capitalize()}", "x": x, "y": y, "clickCount": 1}
        self.send("Input.dispatchMouseEvent", **event, **buttons)

    def click(self, selector: str) -> None:
        """A real click in the middle of the first element that matches."""
        box = self.box(selector)
        for kind in ("pressed", "released"):
            self.mouse(kind, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def box(self, selector: str) -> dict[str, float]:
        """x, y, width and height in the window, after scrolling it into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{found}.scrollIntoView({{block: 'center'}})")
        box: dict[str, float] = self.value(f"{found}.getBoundingClientRect().toJSON()")
        return box

    def screenshot(self, selector: str) -> str:
        """PNG of an element, in base64."""
        box = self.box(selector)
        clip = {name: box[name] for name in ("x", "y", "width", "height")} | {"scale": 1}
        clip["y"] += self.value("scrollY")
        return str(self.send("Page.captureScreenshot", format="png", clip=clip)["data"])

    def close(self) -> None:
        """Close the tab."""
        self.browser.send("Target.closeTarget", targetId=self.target)


def _problem(method: str, parameters: dict[str, Any]) -> str:
    if method == "Runtime.exceptionThrown":
        details = parameters["exceptionDetails"]
        return str(details.get("exception", {}).get("description", details.get("text")))
    if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert", "warning"):
        return "console: " + " ".join(str(part.get("value", part.get("description"))) for part in parameters["args"])
    if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
        return f"log: {parameters['entry']['text']} {parameters['entry'].get('url', '')}"
    failed = method == "Network.loadingFailed" and not parameters.get("canceled")
    return f"request failed: {parameters['errorText']}" if failed else ""
