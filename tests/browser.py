"""A headless Chromium, driven through the pipes of its DevTools protocol."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
EVENTS = ("Network.requestWillBeSent", "Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


READY = """new Promise(done => {
  const look = () => document.body?.dataset.ready ? done(true) : setTimeout(look, 20);
  look();
})"""


class Tab:
    """A page of the browser, with the events that it has reported."""

    def __init__(self, requests: Any, answers: Any):
        self.requests, self.answers, self.session, self.count = requests, answers, None, 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": arguments}
        if self.session is not None:
            message["sessionId"] = self.session
        self.requests.write(json.dumps(message).encode() + b"\0")
        self.requests.flush()
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        return json.loads(content)

    def open(self, path: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Open a file and wait until it is ready."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        phone = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **phone)
        self.call("Page.navigate", url=path.as_uri())
        assert self.evaluate(READY)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press and release keys one after another."""
        for key in keys:
            code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a place."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse's left button at a place."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def reported(self) -> list[str]:
        """Return requests beyond the opened file, exceptions and console messages."""
        self.evaluate("1")  # earlier events have arrived
        found = []
        for event in self.events:
            if event.get("method") not in EVENTS:
                continue
            request = event["params"].get("request", {}).get("url", "")
            if not request.startswith(("file:", "data:", "about:")) or not request:
                found.append(json.dumps(event)[:500])
        files = [e["params"]["request"]["url"] for e in self.events if e.get("method") == EVENTS[0]]
        return found + [url for url in files if url.startswith("file:") and not url.endswith(".html")]


@contextmanager
def browser_tab(path: str, profile: Path) -> Iterator[Tab]:
    """Start a browser and yield one tab."""
    to_read, requests = os.pipe()
    answers, to_write = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 16) for end in (to_read, to_write)]

    def place_pipes() -> None:
        for end, wanted in zip(ends, (3, 4), strict=True):
            os.dup2(end, wanted)

    environment = {**os.environ, "HOME": str(profile)}
    process = subprocess.Popen(
        [path, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=place_pipes,
        close_fds=False,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (to_read, to_write, *ends):
        os.close(end)
    try:
        with os.fdopen(requests, "wb") as writer, os.fdopen(answers, "rb") as reader:
            yield Tab(writer, reader)
    finally:
        process.kill()
        process.wait()
