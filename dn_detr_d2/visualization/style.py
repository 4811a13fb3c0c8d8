"""Colours that can be distinguished with colour blindness, and figures that need no screen."""

from pathlib import Path
from typing import BinaryIO

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..errors import UserError

# Okabe and Ito's palette with grey for yellow, which vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
# The same idea on photographs: light colours, each drawn on a dark outline.
ON_IMAGE = ("#56B4E9", "#E69F00", "#35C99B", "#F0E442", "#FF7F50", "#B39DDB", "#FFFFFF")


def colour(index: int, palette: tuple[str, ...] = PALETTE) -> str:
    """Colour number ``index``, from the start again after the last."""
    return palette[index % len(palette)]


def line_style(index: int) -> str:
    """Of curve number ``index``: solid until all colours are in use, then dashed."""
    return ("-", "--")[index // len(PALETTE) % 2]


def new_figure(rows: int, columns: int, panel: tuple[float, float]) -> tuple[Figure, list]:
    """A figure and its panels, row by row.

    Args:
        rows, columns: of the grid.
        panel: width and height of one panel in inches.
    """
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def render(figure: Figure, target: Path | BinaryIO, dpi: int, **options) -> None:
    """``figure.savefig``, but text between two dollar signs stands as it is; matplotlib would take it for a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}):  # of what is made while drawing
        figure.savefig(target, dpi=dpi, **options)


def save(figure: Figure, path: Path, dpi: int = 100) -> Path:
    """Writes a picture, makes its folder if need be, and returns its path, which ends in .png where none is given.

    Raises:
        UserError: it cannot be written, or is a folder.
    """
    if path.is_dir():
        raise UserError(f"the picture {path} is a folder; name a file, such as {path / 'picture.png'}")
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        render(figure, path, dpi)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UserError(f"the picture {path} cannot be written: {error}") from None
    return path
