"""Chromium without a window, for pages that people read."""

import html
import json
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 120  # seconds
_FIRST = """<!doctype html><script>
var errors = [];
addEventListener("error", e => errors.push(e.message));
</script>"""
_LAST = """<script>
const pictures = [...document.images].map(x => [x.naturalWidth, x.width, x.height]);
const content = document.documentElement.scrollWidth;
const found = JSON.stringify({errors, pictures, content, window: innerWidth});
parent.document.getElementById("found").append(found);
</script>"""


def opened(page, width, folder):
    """What a browser makes of a page in a window of this width.

    Args:
      page: its file, opened as such, without a server.
      width: in pixels. Chromium has no window below 500: the page is in a frame.
      folder: for a page around it.

    Returns:
      `errors` of scripts, `window` and `content`: widths, `pictures`: their own width and the width
      and height they are shown in.
    """
    command = next(filter(None, map(shutil.which, _NAMES)), None)
    if command is None:
        pytest.skip(
            "no Chromium here: apt install chromium shows whether pages look as they should"
        )
    inside = page.read_text().replace("</html>", f"{_LAST}</html>")
    frame = f'<iframe style="border: 0; width: {width}px" srcdoc="{html.escape(_FIRST + inside)}">'
    around = folder / "around.html"
    around.write_text(f'<!doctype html><pre id="found"></pre>{frame}</iframe>')
    dom = subprocess.run(
        [command, "--headless", "--no-sandbox", "--dump-dom", around.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=_PATIENCE,
    ).stdout
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom)
    return json.loads(html.unescape(found))
