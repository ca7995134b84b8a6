"""Chromium, headless, driven by its own protocol: enough to open a page, hand it a file and read what it shows."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--window-size=1200,900",
)  # fmt: skip


class Browser:
    """One page. ``asked`` holds the URL of every request, ``broken`` what the console calls an error."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count(1)
        self.asked: list[str] = []
        self.broken: list[str] = []

    async def __aenter__(self) -> Self:
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = self._folder / "DevToolsActivePort"
        until = time.monotonic() + 120
        while not port.exists() or not port.read_text().strip():
            assert self._process.poll() is None and time.monotonic() < until
            await asyncio.sleep(0.1)
        self._session = aiohttp.ClientSession()
        base = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with self._session.put(f"{base}/json/new?about:blank") as answer:
            page = await answer.json()
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=120)).data)
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.broken.append(str(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] == "security":
                self.broken.append(message["params"]["entry"]["text"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def read(self, expression: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait(self, expression: str, seconds: float = 120.0) -> Any:
        """The expression's value, once it is true."""
        until = time.monotonic() + seconds
        while not (value := await self.read(expression)):
            assert time.monotonic() < until, (expression, await self.read("document.body.innerText"), self.broken)
            await asyncio.sleep(0.1)
        return value

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    async def hand_over(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    async def screenshot(self, path: Path) -> None:
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
