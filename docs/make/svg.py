"""A few lines of SVG: boxes, texts, arrows. Pictures are plain files, drawn without any package."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

FONT = "font-family='ui-monospace, Menlo, Consolas, monospace'"
INK, SOFT, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#ffffff"
# Eight colours that stay apart for colour-blind eyes (after Okabe and Ito), light enough to write on.
COLOURS = ("#a6d3f0", "#f7cf8a", "#a8dcc2", "#f3b9a0", "#d8c2e6", "#fff2a8", "#c9d3dc", "#f4c6de")
STRONG = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass
class Picture:
    """Shapes on a white ground, in the order in which they are drawn; lengths are pixels."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str = PAPER, stroke: str = LINE, r: float = 3) -> None:
        """A rectangle."""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='{r:g}' fill='{fill}' stroke='{stroke}'/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """One line; y is its base line."""
        weight = " font-weight='bold'" if bold else ""
        place = f"x='{x:g}' y='{y:g}' font-size='{size:g}' fill='{fill}' text-anchor='{anchor}'{weight}"
        self.parts.append(f"<text {place}>{escape(text)}</text>")

    def lines(
        self, x: float, y: float, lines: list[str], size: float = 12, fill: str = INK, anchor: str = "start"
    ) -> None:
        """Several lines."""
        for number, line in enumerate(lines):
            self.text(x, y + number * size * 1.35, line, size, fill)

    def path(
        self, points: list[tuple[float, float]], stroke: str = SOFT, width: float = 1.5, arrow: bool = False
    ) -> None:
        """A line through points, with an arrow head at its end if asked."""
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        head = " marker-end='url(#head)'" if arrow else ""
        self.parts.append(f"<path d='{d}' fill='none' stroke='{stroke}' stroke-width='{width:g}'{head}/>")

    def dot(self, x: float, y: float, r: float, fill: str) -> None:
        """A filled circle."""
        self.parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{r:g}' fill='{fill}'/>")

    def __str__(self) -> str:
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width:g} {self.height:g}' "
            f"width='{self.width:g}' height='{self.height:g}' role='img' {FONT}>\n<title>{escape(self.title)}</title>\n"
            "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            f"orient='auto-start-reverse'><path d='M0,0 L8,4 L0,8 z' fill='{SOFT}'/></marker></defs>\n"
            f"<rect width='{self.width:g}' height='{self.height:g}' rx='6' fill='{PAPER}'/>\n"
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"
