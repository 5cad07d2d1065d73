"""Self-contained HTML pages: tables and inline SVG figures, in the style of the reports."""

from __future__ import annotations

import io
import json
import unicodedata
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

_MAX_CELL_CHARACTERS = 400
_STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #666; --line: #ddd; --hit: #e3eef6; --box: #f6f6f6;
  --true: #cfe8cf; --predicted: #fbdcb4; --page: #fff }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --quiet: #999; --line: #444; --hit: #1d3c55; --box: #222;
  --true: #25502b; --predicted: #6b4410; --page: #161616 } svg { background: #fff; border-radius: 4px } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62em;
  margin: 2em auto; padding: 0 1em; overflow-wrap: break-word }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: .2em .7em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.n { text-align: right } td.hit { background: var(--hit) } svg { max-width: 100%; height: auto }
pre { background: var(--box); padding: 1em; overflow-x: auto } a { color: inherit }
mark { color: inherit; border-radius: .2em; padding: 0 .15em } mark.true { background: var(--true) }
mark.predicted { background: var(--predicted) } mark small { color: var(--quiet); margin-left: .3em }
.example { border-top: 1px solid var(--line); padding: .5em 0 } .example p { margin: .2em 0 }
.quiet { color: var(--quiet) }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """A complete page, in the style of the reports, from HTML fragments."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    return page.encode(errors="backslashreplace").decode()  # names of files need not be Unicode


def table(rows: Sequence[Sequence[Any]], *, header: bool = True, diagonal: bool = False) -> str:
    """An HTML table whose first row is the header; numbers are right-aligned, `diagonal` highlights the diagonal."""
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, value in enumerate(row):
            tag = "th" if header and number == 0 else "td"
            classes = "n" if isinstance(value, (int, float)) or value is None else ""
            classes += " hit" if diagonal and number and number == column else ""
            opening = f'{tag} class="{classes}"' if classes else tag
            cells.append(f"<{opening}>{_cell(value)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text if len(text) <= _MAX_CELL_CHARACTERS else text[:_MAX_CELL_CHARACTERS] + " …")


def label(text: str) -> str:
    """`text` for matplotlib to draw as it is: no formula, no entry hidden from the legend, no control character."""
    shown = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text
    ).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def svg(figure: Any) -> str:
    """A figure as an inline SVG; deterministic."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bert_fast"}), warnings.catch_warnings():
        # matplotlib's font lacks most scripts; the browser renders the text with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def panels_of(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure without a GUI window, and its axes in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)
