"""Turn the text of a terminal into an SVG picture: `make demo 2>&1 | python -m tools.text_to_svg docs/demo.svg`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LINE_PX, CHAR_PX, MARGIN_PX = 100, 18, 8.0, 16
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def visible_lines(text: str) -> list[str]:
    """What stays on the screen: after a carriage return a line is overwritten."""
    lines = []
    for line in ESCAPES.sub("", text).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip()[:WIDTH])
    return lines


def svg(lines: list[str]) -> str:
    """A dark terminal window with the lines."""
    width = int(WIDTH * CHAR_PX + 2 * MARGIN_PX)
    height = len(lines) * LINE_PX + 2 * MARGIN_PX
    rows = "\n".join(
        f'<text x="{MARGIN_PX}" y="{MARGIN_PX + (i + 0.75) * LINE_PX:.0f}" xml:space="preserve">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#161b22"/>\n'
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" fill="#d0d7de">\n{rows}\n</g>\n'
        "</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(visible_lines(sys.stdin.read().rstrip("\n"))), encoding="utf-8")
