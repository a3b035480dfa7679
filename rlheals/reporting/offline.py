"""Charts and DVC's plots page as files that open without a network."""

from __future__ import annotations

import io
import json
import re
import sys
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vl_convert
from PIL import Image

if TYPE_CHECKING:
    import altair as alt

DVC_VEGA_LITE = "5.21"
"""Version behind ``dvc plots``: its templates are Vega-Lite 5."""

_PLACES = re.compile(r'\s(?:d|transform|points|x|y|x1|x2|y1|y2|cx|cy|r|width|height)="[^"]*"')
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?:e-?\d+)?")

_FIGURE_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 1.5rem; background: #fff; font-family: system-ui, sans-serif; }}</style>
<script src="{script}"></script>
</head>
<body>
<div id="chart"></div>
<script>
vegaEmbed("#chart", {spec}, {{actions: {{export: true, source: false, compiled: false, editor: false}}}});
</script>
</body>
</html>
"""

_DVC_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots of two revisions</title>
<!-- Written by `python -m rlheals.reporting.offline`; the scripts are inside so that the page needs no network. -->
<style>
body { margin: 2rem; background: #fff; color: #1f2328; font-family: system-ui, sans-serif; }
body > div { margin-bottom: 2.5rem; }
table { border-collapse: collapse; }
td, th { padding: 0.3rem 0.8rem; border-bottom: 1px solid #d0d7de; text-align: left; }
</style>
<script>
@BUNDLE@
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


@cache
def javascript(vega_lite: str | None = None) -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``window.vegaEmbed``; safe inside a script element.

    Args:
        vega_lite: Vega-Lite version such as "5.21"; the newest that vl-convert carries when None.
    """
    return _inside_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite))


def write_javascript(path: Path) -> None:
    """Write the script that the figure pages of a report share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(javascript(), encoding="utf-8")


def export(chart: alt.TopLevelMixin, name: str, folder: Path, script: str = "../assets/vega.js") -> str:
    """Write ``<name>.svg``, ``.png`` (twice the size in pixels) and ``.html`` and return the SVG text.

    Args:
        chart: the figure.
        name: file name without an ending, also the prefix of ids inside the SVG.
        folder: where the files go.
        script: address of `write_javascript`'s file, relative to ``folder``.
    """
    spec: dict[str, Any] = chart.to_dict()
    svg = unique_ids(shorter(vl_convert.vegalite_to_svg(spec)), name)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    (folder / f"{name}.png").write_bytes(smaller(vl_convert.svg_to_png(svg, scale=2)))
    page = _FIGURE_PAGE.format(title=escape(name), script=escape(script), spec=_inside_script(json.dumps(spec)))
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return svg


def shorter(svg: str) -> str:
    """The same drawing with coordinates to a hundredth of a pixel, where the renderer writes fifteen digits.

    >>> shorter('<path d="M1.23456789,-0.00049L7,8.5" aria-label="p = 0.0004567"/>')
    '<path d="M1.23,0L7,8.5" aria-label="p = 0.0004567"/>'
    """
    return _PLACES.sub(lambda found: _LONG_NUMBER.sub(_hundredths, found[0]), svg)


def _hundredths(found: re.Match[str]) -> str:
    text = f"{float(found[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def smaller(png: bytes) -> bytes:
    """The same picture with at most 256 colours, a tenth of the bytes: results are kept in git."""
    with Image.open(io.BytesIO(png)) as picture, io.BytesIO() as written:
        palette = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(written, "PNG", optimize=True)
        return written.getvalue()


def unique_ids(svg: str, prefix: str) -> str:
    """Prefix all ids of an SVG, so that several of them fit in one page, and number them by their place.

    The renderer goes on counting from one drawing to the next; the same drawing must not depend on what it drew before.

    >>> unique_ids('<clipPath id="clip7"/><g clip-path="url(#clip7)"/>', "a")
    '<clipPath id="a-clip0"/><g clip-path="url(#a-clip0)"/>'
    """
    found = dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))
    names = {name: f"{prefix}-{re.sub(r'[0-9]+$', str(place), name)}" for place, name in enumerate(found)}

    def renamed(match: re.Match[str]) -> str:
        return match[1] + names.get(match[2], f"{prefix}-{match[2]}")

    svg = re.sub(r'(\bid=")([^"]+)', renamed, svg)
    return re.sub(r'(url\(#|href="#)([^)"]+)', renamed, svg)


def dvc_page() -> str:
    """The template for ``dvc config plots.html_template``: a page that holds its own scripts."""
    return _DVC_PAGE.replace("@BUNDLE@", javascript(DVC_VEGA_LITE))


def _inside_script(text: str) -> str:
    """Keep text from closing the script element it is put in."""
    return re.sub(r"</(script)", r"<\\/\1", text, flags=re.IGNORECASE).replace("<!--", "<\\!--")


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else ".dvc/page.html").write_text(dvc_page(), encoding="utf-8")
