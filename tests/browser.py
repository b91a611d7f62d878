"""A real Chromium, by its DevTools protocol: what a page logs, loads, measures and prints."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)
START_SECONDS = 60


class Browser:
    """One page. `events` collects everything that the browser said of it."""

    def __init__(self, profile: Path):
        self.profile = profile
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.numbers = itertools.count(1)
        self.events: list[dict] = []

    async def __aenter__(self) -> "Browser":
        file, end = self.profile / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not (file.exists() and file.read_text().strip()):
            assert self.process.poll() is None and time.monotonic() < end, "the browser does not start"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [target for target in await answer.json() if target["type"] == "page"]
        self.socket = await self.session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        self.process.terminate()
        self.process.wait(30)

    async def call(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(START_SECONDS)).data)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def open(self, url: str, width: int, height: int = 900) -> None:
        """Load a page as wide as a screen; a narrow one is a phone's."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Page.navigate", url=url)
        end = time.monotonic() + START_SECONDS
        while await self.value("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < end, f"{url} does not load"
            await asyncio.sleep(0.1)

    async def value(self, script: str):
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def pdf(self) -> bytes:
        return base64.b64decode((await self.call("Page.printToPDF", printBackground=True))["data"])

    async def screenshot(self, path: Path, whole: bool = True) -> None:
        data = (await self.call("Page.captureScreenshot", captureBeyondViewport=whole))["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        found = []
        for event in self.events:
            values = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
                found.append(str(values["args"]))
        return found

    def requested(self) -> list[str]:
        """Addresses that were asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [values["request"]["url"] for values in sent]
