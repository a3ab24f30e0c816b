"""Take the README's picture from a real run: ``python docs/pictures.py``; it needs Chromium and playwright."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from gradwatch import read_history
from gradwatch._page import html_of

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "img" / "tab.png"


def main() -> None:
    """Run the demo for some epochs, open its page, and keep the picture."""
    folder = Path(tempfile.mkdtemp())
    demo = [sys.executable, str(ROOT / "examples" / "digits.py"), "--epochs", "8"]
    subprocess.run([*demo, "--log-dir", str(folder / "runs")], check=True, cwd=ROOT)
    page_file = folder / "page.html"
    page_file.write_text(html_of(read_history(folder / "runs"), "digits"), "utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(page_file.as_uri())
        page.wait_for_function("window.gradwatchReady > 0")
        page.wait_for_timeout(300)
        page.screenshot(path=str(folder / "tab.png"), full_page=True)
        browser.close()
    PICTURE.parent.mkdir(exist_ok=True)
    with Image.open(folder / "tab.png") as picture:
        picture.convert("RGB").save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
