"""What the demo shows: a contact sheet as PNG and a page that needs nothing but itself."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from dinosearch.demo.run import DemoReport

CELL = 96
GAP = 10
CAPTION = 30
RIGHT, WRONG, QUERY = "#2e7d32", "#c62828", "#37474f"


def write_sheet(report: "DemoReport", path: Path) -> None:
    """One row per query: the image, then its nearest neighbours, framed green where the label agrees, red where not."""
    n_columns = 1 + max(len(shown.matches) for shown in report.shown)
    step, row_height = CELL + GAP, CELL + CAPTION + GAP
    header = 34
    sheet = Image.new("RGB", (GAP * 3 + n_columns * step, header + GAP + len(report.shown) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    draw.text((GAP, GAP), "query", QUERY, font=font)
    draw.text((GAP * 3 + step, GAP), "nearest images, by cosine similarity", QUERY, font=font)
    for i, shown in enumerate(report.shown):
        top = header + i * row_height
        _cell(sheet, draw, font, shown.path, (GAP, top), QUERY, shown.label)
        for j, (match, label) in enumerate(shown.matches):
            colour = RIGHT if label == shown.label else WRONG
            place = (GAP * 3 + (j + 1) * step, top)
            _cell(sheet, draw, font, Path(match.path), place, colour, f"{match.score:.3f} {label}")
    sheet.save(path)


def write_page(report: "DemoReport", path: Path) -> None:
    """The figures and the same matches as one HTML file: no script, nothing fetched."""
    rows = "".join(
        f"<tr><th>{name}<td>{_percent(scores.knn)}<td>{_percent(scores.linear)}"
        for name, scores in (
            ("raw pixels", report.pixels),
            ("untrained ViT", report.untrained),
            ("trained ViT", report.trained),
        )
    )
    queries = "".join(
        f"<section><figure class=query>{_picture(shown.path)}<figcaption>{html.escape(shown.label)}</figcaption>"
        "</figure>"
        + "".join(
            f"<figure class={'right' if label == shown.label else 'wrong'}>{_picture(Path(match.path))}"
            f"<figcaption>{match.score:.3f} {html.escape(label)}</figcaption></figure>"
            for match, label in shown.matches
        )
        + "</section>"
        for shown in report.shown
    )
    commands = "\n".join(html.escape(command) for command in report.commands)
    path.write_text(
        PAGE.format(
            data=html.escape(report.data),
            n_train=f"{report.n_train:,}",
            n_test=f"{report.n_test:,}",
            k=report.knn_k,
            rows=rows,
            sentence=html.escape(report.sentence),
            commands=commands,
            queries=queries,
            seconds=f"{report.seconds:.0f}",
            right=RIGHT,
            wrong=WRONG,
            grey=QUERY,
        ),
        encoding="utf-8",
    )


PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>dinosearch demo</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem 1rem .3rem 0; text-align: right; font-variant-numeric: tabular-nums }}
th:first-child {{ text-align: left; font-weight: 500 }}
thead th {{ border-bottom: 1px solid {grey} }}
pre {{ padding: .8rem; overflow: auto; border: 1px solid {grey}; border-radius: .3rem }}
section {{ display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; align-items: flex-start }}
figure {{ margin: 0; width: 5.6rem }}
figure img {{ width: 100%; box-sizing: border-box; border: 3px solid {grey}; display: block }}
figure img {{ image-rendering: pixelated }}
.query {{ margin-right: 1rem }}
.right img {{ border-color: {right} }}
.wrong img {{ border-color: {wrong} }}
figcaption {{ font-size: .75rem; text-align: center; overflow-wrap: anywhere }}
</style>
<h1>dinosearch demo</h1>
<p>{data}: a small vision transformer learnt from {n_train} images without their labels;
accuracy is measured on {n_test} images that it has not seen.</p>
<table>
<thead><tr><th>vectors<th>k-NN (k = {k})<th>linear probe</thead>
<tbody>{rows}</tbody>
</table>
<p>{sentence}</p>
<h2>The commands</h2>
<p>Run in this folder; the demo took {seconds} seconds for all of them.</p>
<pre>{commands}</pre>
<h2>What looks like this?</h2>
<p>Left: images held out from training. Right: the nearest in the index, framed green where the label agrees and red
where it does not.</p>
{queries}
</html>
"""


def _cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: "ImageFont.ImageFont | ImageFont.FreeTypeFont",
    path: Path,
    place: tuple[int, int],
    colour: str,
    caption: str,
) -> None:
    left, top = place
    draw.rectangle((left - 3, top - 3, left + CELL + 2, top + CELL + 2), fill=colour)
    sheet.paste(_thumbnail(path).resize((CELL, CELL), Image.Resampling.NEAREST), place)
    while len(caption) > 3 and draw.textlength(caption, font=font) > CELL + GAP - 2:
        caption = caption[:-1]
    draw.text((left, top + CELL + 6), caption, "black", font=font)


def _thumbnail(path: Path) -> Image.Image:
    from dinosearch.images import Fit, decode, read_bytes

    data = read_bytes(path)
    with Image.open(io.BytesIO(data)) as image:
        side = min(CELL, max(image.size))
    return Image.fromarray(decode(data, Fit(side, mode="pad")).pixels)


def _picture(path: Path) -> str:
    buffer = io.BytesIO()
    _thumbnail(path).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
