"""One HTML page without scripts that needs no other file: pictures are inside it."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate

from ..utils.text_output import escaped
from ..visualization.style import render

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em}
h1 {font-size: 1.6em} h2 {font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc}
table {border-collapse: collapse; margin: 1em 0} th, td {padding: 2px 10px; border-bottom: 1px solid #ddd}
th {background: #f3f3f3} img {max-width: 100%} figure {margin: 1em 0} figcaption, .left-out {color: #666}
pre {background: #f6f6f6; padding: 1em; white-space: pre-wrap; font-size: 12px} nav a {margin-right: 1em}
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: unique on the page.
        body: HTML.
    """

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return self.title.lower().replace(" ", "-")


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = " ".join(f'<a href="#{x.anchor}">{html.escape(x.title)}</a>' for x in sections)
    bodies = "\n".join(
        f'<section id="{x.anchor}">\n<h2>{html.escape(x.title)}</h2>\n{x.body}\n</section>' for x in sections
    )
    head = f'<meta charset="utf-8"><title>{text(title)}</title><style>{STYLE}</style>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n<h1>{text(title)}</h1>\n<nav>{links}</nav>\n'
        f"{bodies}\n</body>\n</html>\n"
    )


def text(words: str) -> str:
    """Words as HTML; what UTF-8 cannot write is escaped."""
    return html.escape(escaped(words))


def paragraph(words: str) -> str:
    """A paragraph."""
    return f"<p>{text(words)}</p>"


def left_out(reason: str) -> str:
    """A paragraph in place of what cannot be shown."""
    return f'<p class="left-out">{text(reason)}</p>'


def verbatim(words: str) -> str:
    """Text in its own lines."""
    return f"<pre>{text(words)}</pre>"


def table(rows: Sequence[Sequence], headers: Sequence[str]) -> str:
    """A table; floats with two digits behind the point."""
    return tabulate(rows, [escaped(x) for x in headers], tablefmt="html", floatfmt=".2f", missingval="-")


def drawing(figure: Figure, words: str, dpi: int = 80) -> str:
    """A figure of matplotlib with a caption."""
    file = io.BytesIO()
    render(figure, file, dpi, format="png")
    return _inline(file, "png", words)


def photograph(pixels: np.ndarray, words: str) -> str:
    """(H, W, 3) uint8 RGB with a caption."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return _inline(file, "jpeg", words)


def _inline(file: io.BytesIO, kind: str, words: str) -> str:
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{text(words)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{text(words)}</figcaption></figure>"
    )
