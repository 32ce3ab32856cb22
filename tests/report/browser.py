"""Rendering of a page in headless Chromium, light, dark and on a phone; every console message is an error.

    python -m tests.report.browser runs/digits/report/index.html

The pictures are written next to the page: index-light.png, index-dark.png, index-phone.png. A page of a report has no scripts,
and its policy refuses every request, so that a message on the console is a fault of the page.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"light": (1, 1200), "dark": (0, 1200), "phone": (1, 500)}
"""Preferred color scheme as in Chromium's settings, and width in pixels, of each picture."""
HEIGHT = 9000
TIMEOUT_S = 120


class PageError(Exception):
    """Fault of a page, or of the machine that renders it."""


def program():
    """Return the path of Chromium; None if it is not installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def render(page, *, views=tuple(VIEWS)):
    """Render a page to pictures next to it, and return their paths. Raises PageError for a message on the console."""
    if not page.is_file():
        raise PageError(f"{page} not found; write a report first, for example with `make demo`")
    browser = program()
    if browser is None:
        raise PageError(f"none of {', '.join(PROGRAMS)} was found; install Chromium")
    return [_render(browser, page.resolve(), view) for view in views]


def _render(browser, page, view):
    scheme, width = VIEWS[view]
    picture = page.with_name(f"{page.stem}-{view}.png")
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
        flags += [f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}"]
        flags += [f"--window-size={width},{HEIGHT}", f"--screenshot={picture}", page.as_uri()]
        done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    messages = re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", done.stderr)
    if messages:
        raise PageError(f"{page} ({view}): {len(messages)} messages on the console:\n" + "\n".join(messages))
    if done.returncode or not picture.is_file():
        raise PageError(f"{page} ({view}): no picture, exit code {done.returncode}:\n{done.stderr[-2000:]}")
    _crop(picture)
    return picture


def _crop(picture):
    """Cut off the empty part below the page."""
    image = Image.open(picture).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    area = ImageChops.difference(image, empty).getbbox()
    if area is not None:
        image.crop((0, 0, image.width, min(image.height, area[3] + 20))).save(picture)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.report.browser")
    parser.add_argument("page", type=Path)
    try:
        for picture in render(parser.parse_args().page):
            print(picture)
    except PageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
