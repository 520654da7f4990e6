"""Opens a page in a headless browser and records its requests, its console and its content."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str:
    """Return the browser, or skip."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser to open the page in, and none of {', '.join(NAMES)} is installed")
    return found


@dataclass(frozen=True)
class Visit:
    """What a page did when it was opened.

    Attributes:
        dom: The page after loading.
        requests: Requested addresses, without the page and data URIs.
        console: Lines on the console.
    """

    dom: str
    requests: list[str]
    console: list[str]


def visit(page: Path, folder: Path, *options: str) -> Visit:
    """Open a page from disk.

    Args:
        page: The page.
        folder: For the browser's profile and logs.
        options: More options of the browser.
    """
    log = folder / "net.json"
    command = [
        find(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars",
        "--disable-sync", "--disable-extensions",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr", "--v=0",
        *options, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(done.stdout, _requests(log, page.as_uri()), console)


def _requests(log: Path, page: str) -> list[str]:
    """Return the addresses in a net log that the page requested; others come from the browser itself."""
    found = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # a request of the page has the page's origin (`null` for a file), a request of the browser has none
    asked = [p["url"] for p in found if p.get("url") and p.get("initiator", "not an origin") != "not an origin"]
    return [url for url in asked if url != page and not url.startswith("data:")]
