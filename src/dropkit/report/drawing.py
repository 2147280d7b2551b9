"""From a matplotlib figure to SVG that lives inside a page.

The page sets the colours: figures are drawn in stand-in colours, which become CSS variables, so that dark mode
recolours them. Text stays text. The same record gives the same bytes: ids come from the figure's name, and no date
is written. Each id carries the figure's name, so that figures on one page do not use each other's clip paths.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from dropkit.report.wording import printable

# Stand-ins no one would pick, so that none can be mistaken for a colour that was meant.
INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
FIRST, SECOND, THIRD, FOURTH = "#0a0b05", "#0a0b06", "#0a0b07", "#0a0b08"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
    FOURTH: "var(--fair)",
}

# One unit of the drawing is about 1.5 px beside the text and 1 px on a phone, so 9.5 is readable on both.
WIDTH, FONT_SIZE = 4.6, 9.5
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a column may be called "$x"
    "font.family": "DejaVu Sans",
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 1,
    "ytick.labelsize": FONT_SIZE - 1,
    "legend.fontsize": FONT_SIZE - 0.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 0,
}

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def drawing_style(name: str) -> Iterator[None]:
    """Settings for one figure; matplotlib's own come back afterwards.

    Its warnings about missing glyphs are dropped: text stays text, and the browser has the glyphs.
    """
    settings: Any = {**STYLE, "svg.hashsalt": name}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        warnings.filterwarnings("ignore", message=".*constrained_layout not applied.*")
        yield


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure with rows x columns panels, without pyplot and its global list of figures.

    Args:
        height: in the unit of `WIDTH`, inches of 72 drawing units.
        rows: panels above each other.
        columns: panels side by side.
        options: for `Figure.subplots`.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element for a page.

    Args:
        figure: drawn inside `drawing_style(name)`.
        name: letters, digits and dashes; one per page.
        label: what a person who cannot see the figure is told.
    """
    figure.patch.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        element.attrib = {key: localise(key, value, name) for key, value in element.attrib.items()}
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK))
    for parent in list(root.iter()):
        for child in [
            c for c in parent if c.tag in {"metadata", "style"}
        ]:  # a style here would rule the whole page
            parent.remove(child)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": printable(label), "data-figure": name}
    return ET.tostring(root, encoding="unicode")


def localise(key: str, value: str, name: str) -> str:
    """One attribute with the figure's name in ids and references, and CSS variables for stand-in colours."""
    if key == "id":
        return f"{name}-{value}"
    if key == LINK:
        return value.replace("#", f"#{name}-", 1)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    return re.sub(r"#0a0b0\d", lambda match: VARIABLES[match[0]], value)
