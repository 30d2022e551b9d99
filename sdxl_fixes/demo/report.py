"""The demo's report: results.json, one HTML page with its pictures inside, and one picture for the README.
Every number and every verdict is computed."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.charts import Dots, dot_rows
from sdxl_fixes.demo.finetune import PAINTED, Result
from sdxl_fixes.demo.measure import summarize
from sdxl_fixes.demo.pictures import caption, data_uri, enlarged, readme_picture, shown, strip
from sdxl_fixes.demo.plan import Plan
from sdxl_fixes.demo.world import CANVAS, PLACES, UNIT, Variation
from sdxl_fixes.schedule import NoiseSchedule

GREYS = [place for place, colour in PLACES.items() if not isinstance(colour, str) and len(set(colour)) == 1]
COLOURS = [place for place, colour in PLACES.items() if not isinstance(colour, str) and len(set(colour)) > 1]
CLOSE = 0.05  # of black to white: what counts as the brightness that was asked
STYLE = """
:root{--ink:#1c1f24;--muted:#667080;--line:#e3e6ea;--paper:#fff;--soft:#f6f7f8;--accent:#0b7a75;--stock:#8a93a0}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--muted:#9aa3af;--line:#2b3038;--paper:#14171b;--soft:#1b1f25;--accent:#3cc7bd;--stock:#7d8794}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:36px 32px 64px}
h1{font-size:clamp(26px,3.4vw,38px);line-height:1.2;letter-spacing:-.02em;margin:0 0 6px;font-weight:650;text-wrap:balance}
h2{font-size:22px;line-height:1.3;letter-spacing:-.01em;margin:56px 0 8px;font-weight:650}
p,ul{max-width:68ch;margin:10px 0}
ul{padding-left:1.2em}
li{margin:6px 0}
.lead{color:var(--muted);margin:0 0 22px}
.pairs{display:grid;grid-template-columns:repeat(5,1fr);gap:16px}
figure{margin:0}
.pairs figcaption{font-weight:600;font-size:15px;line-height:1.3;margin-bottom:8px}
.pairs img{width:100%;aspect-ratio:1;display:block;border-radius:6px}
.pair{display:grid;gap:10px}
.tag{display:flex;justify-content:space-between;gap:6px;font-size:13px;line-height:1.4;margin-top:5px;color:var(--muted)}
.tag b{font-weight:600;white-space:nowrap}
.tag.fixed{color:var(--accent)}
.key{display:flex;flex-wrap:wrap;gap:6px 22px;font-size:14px;color:var(--muted);margin:14px 0 4px}
.key svg{width:16px;height:16px;vertical-align:-3px;margin-right:6px}
.chart{width:100%;max-width:760px;height:auto;display:block;margin:6px 0}
.chart text{fill:var(--muted);font-size:14px}
.chart .name{fill:var(--ink)}
.grid{stroke:var(--line)}
.miss{stroke:var(--stock);stroke-width:2;opacity:.45}
.before{fill:var(--stock)}
.control{fill:none;stroke:var(--stock);stroke-width:2}
.v_alone{fill:none;stroke:var(--accent);stroke-width:2}
.fixed{fill:var(--accent)}
.asked{stroke:var(--ink);stroke-width:2.5}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:15px;font-variant-numeric:tabular-nums;margin:12px 0}
th,td{padding:5px 18px 5px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--muted)}
th:first-child,td:first-child{text-align:left}
td:last-child,th:last-child{padding-right:0}
td.fixed{color:var(--accent);font-weight:600}
.strips{display:grid;grid-template-columns:1fr 1fr;gap:12px 20px}
.strips h3{margin:0;font-size:15px;font-weight:600;color:var(--muted)}
.strips h3.fixed{color:var(--accent)}
.strips figcaption{font-size:14px;color:var(--muted);line-height:1.4}
.strips figcaption span{display:none}
.strips img{width:100%;display:block;border-radius:4px}
.small{color:var(--muted);font-size:15px}
code{font:14px ui-monospace,Menlo,Consolas,monospace;background:var(--soft);padding:1px 5px;border-radius:4px}
@media(max-width:760px){main{padding:22px 16px 48px}.pairs{grid-template-columns:1fr;gap:22px}.pair{grid-template-columns:1fr 1fr}.chart text{font-size:19px}h2{margin-top:44px}.strips{grid-template-columns:1fr;gap:8px}.strips h3{display:none}.strips figcaption span{display:inline}th,td{padding-right:12px}}
"""


def write_report(plan: Plan, results: list[Result], seconds: float, output: Path) -> dict[str, Any]:
    """Write the three files of finished runs. Returns the content of results.json."""
    numbers = summarize(plan, results, seconds)
    before, fixed = _by_key(results, "before"), _by_key(results, "fixed")
    files = {
        "demo.png": readme_picture(before, fixed),
        "report.html": page(numbers, results).encode(),
        "results.json": json.dumps(numbers, indent=2).encode(),  # the last: whoever sees it sees all three
    }
    try:
        for name, content in files.items():
            with replacing(output / name) as file:
                file.write_bytes(content)
    except OSError as error:
        raise OSError(
            f"cannot write into {output} ({error.strerror}): choose another folder with --output"
        ) from error
    return numbers


def table(numbers: dict[str, Any]) -> str:
    """The plain-text table of a results.json: the background's brightness in percent, black to white."""
    runs = numbers["runs"]
    names = [place for place in PLACES if place in GREYS]
    lines = [f"{'brightness of the background, %':<34}" + "".join(f"{name:>15}" for name in names)]
    rows = [("asked", numbers["asked"]), *((run["label"], run["places"]) for run in runs)]
    for label, cells in rows:
        got = {cell["place"]: cell["brightness"] for cell in cells}
        lines.append(f"{label:<34}" + "".join(f"{100 * got[name]:>15.0f}" for name in names))
    return "\n".join([*lines, "", *verdicts(numbers)])


def verdicts(numbers: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    runs = {run["key"]: run for run in numbers["runs"]}
    right, steps = _cells(numbers["asked"]), numbers["plan"]["steps"]
    got = {key: _cells(run["places"]) for key, run in runs.items()}
    sentences = []
    for place in ("at night", "in snow"):
        parts = [f"{_percent(cells[place])} {_WHO[key]}" for key, cells in got.items()]
        said = f"Asked for a background of {_percent(right[place])} brightness ({place}): "
        sentences.append(said + ", ".join(parts) + ".")
    for key in ("control", "v_alone", "fixed"):
        old, new = runs["before"]["miss"], runs[key]["miss"]
        change = (
            "is as large as before" if abs(new - old) < 0.1 * old else ("falls" if new < old else "rises")
        )
        sentences.append(
            f"After {steps} steps {_HOW[key]} the mean distance between brightness asked and got {change}: "
            f"{100 * new:.1f} points, {100 * old:.1f} before."
        )
    near = {
        key: sum(
            abs(cell["brightness"] - right[place]["brightness"]) < CLOSE for place, cell in cells.items()
        )
        for key, cells in got.items()
    }
    counted = ", ".join(f"{count} {_WHO[key]}" for key, count in near.items())
    sentences.append(f"Places within {100 * CLOSE:.0f} points of what was asked, of {len(right)}: {counted}.")
    return sentences


_WHO = {
    "before": "on SDXL's schedule",
    "control": "after more training on it",
    "v_alone": "after learning v-prediction on it",
    "fixed": "with the fixes",
}
_HOW = {
    "control": "on SDXL's own schedule",
    "v_alone": "with v-prediction on SDXL's own schedule",
    "fixed": "with v-prediction and zero terminal SNR",
}


def page(numbers: dict[str, Any], results: list[Result]) -> str:
    """The whole report as HTML that asks for nothing outside itself."""
    plan, stock = numbers["plan"], NoiseSchedule.sdxl()
    # at SDXL's last step, in the mean over the canvas of the plane of latents that is brightness: what black
    # leaves there, and how far noise alone moves it
    signal, noise = stock.residual_signal * 3**0.5 / UNIT, stock.sqrt_one_minus_alphas_cumprod[-1] / CANVAS
    body = f"""<main>
<h1>{html.escape(_headline(numbers))}</h1>
<p class="lead">One tiny SDXL, before and after {plan["steps"]} steps of finetuning with v-prediction and zero terminal SNR. Same noise. Under each
picture: how bright its background is, from 0 % (black) to 100 % (white).</p>
{_pairs(numbers, results)}
<h2>What came out</h2>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdicts(numbers))}</ul>
<h2>Brightness of the background, asked and got</h2>
{_KEY}
{_chart(numbers, "brightness", [*GREYS, *(place for place in PLACES if place not in (*GREYS, *COLOURS))])}
<h2>Saturation of coloured backgrounds, asked and got</h2>
{_KEY}
{_chart(numbers, "saturation", COLOURS)}
<h2>Every picture</h2>
<div class="strips"><h3>SDXL's schedule</h3><h3 class="fixed">with the fixes</h3>{_strips(results)}</div>
<h2>Why</h2>
<p>A diffusion model is trained to remove noise, and it generates from pure noise. SDXL's schedule never shows it pure noise: at its last
training step {stock.residual_signal:.1%} of the picture is still there. That sounds little, but noise averages out over the canvas. In the
mean of {CANVAS} x {CANVAS} pixels the brightness of a black picture stands {signal / noise:.0f} times above the noise,
so the model reads the brightness off its input instead of the caption. When it generates there is nothing to read: pure noise has mean 0, which is
grey. The larger the canvas, the stronger.</p>
<p>Zero terminal SNR (arXiv:2305.08891) ends the schedule in pure noise, in training and in generation, so that the last step has only the
caption to go by. It needs v-prediction: to predict the noise in pure noise teaches nothing about pictures. v-prediction alone is trained here,
too: what it mends and what it leaves is in the numbers above. It matters that captions do not say everything: under one caption the brightness
of the background varies with a standard deviation of {100 * Variation().shade / 2:.0f} points, and what a caption leaves open a network reads from its input.</p>
<h2>All numbers</h2>
<div class="scroll">{_table(numbers)}</div>
<h2>How it was measured</h2>
<p>The network is tiny-sdxl: diffusers' UNet2DConditionModel, SDXL's class and structure, 9.6 million parameters, trained as SDXL was
(epsilon, SDXL's schedule) on {CANVAS} x {CANVAS} pictures of 32 things in {len(PLACES)} places. The latents are the pictures' own pixels under
JPEG's cosine transform, and each caption word is a frozen random vector: no VAE and no text encoder. The three finetunes start from its weights and
see the same pictures, captions, noise and timesteps in the same order (seed {plan["seed"]}): {plan["steps"]} steps of {plan["batch"]}, AdamW at
{plan["learning_rate"]:g}, averaged weights, float32, one thread. The control keeps epsilon and SDXL's schedule; the second is told v-prediction
and nothing else; the third v-prediction and zero terminal SNR. The checkpoint was trained on backgrounds that vary a quarter as much. Sampled with
Euler's ancestral sampler in {plan["sampling_steps"]} steps on the schedule that was trained last, without guidance, {plan["pictures"]} pictures per place.</p>
<p>The background is measured on the outermost two pixels, where no object reaches. What was asked is what training pictures of the same
caption have there: black is a little above 0 %, because backgrounds vary.</p>
<p class="small">Checkpoint {numbers["checkpoint"]}; {", ".join(f"{name} {value}" for name, value in numbers["versions"].items())};
{numbers["timing"]["total_seconds"]:.0f} seconds. This shows the mechanism on a small network. It does not say how strong the effect is in
SDXL, nor how long SDXL takes to learn v-prediction. Drawings: Fluent Emoji, Copyright (c) Microsoft Corporation, MIT licence.</p>
</main>"""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>sdxl-fixes demo</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


# ---------------------------------------------------------------- parts of the page


def _headline(numbers: dict[str, Any]) -> str:
    """What happened to black, in one line."""
    got = {run["key"]: _cells(run["places"])["at night"]["brightness"] for run in numbers["runs"]}
    night = _cells(numbers["asked"])["at night"]["brightness"]
    names = [_grey(got[key], night) for key in ("before", "fixed")]
    return f"Asked for night, SDXL's schedule paints {names[0]}. With the fixes: {names[1]}."


def _grey(brightness: float, black: float) -> str:
    return "black" if brightness < black + CLOSE else "dark grey" if brightness < 0.25 else "grey"


def _pairs(numbers: dict[str, Any], results: list[Result]) -> str:
    before, fixed = _by_key(results, "before"), _by_key(results, "fixed")
    cells = {run["key"]: run["places"] for run in numbers["runs"]}
    parts = []
    for place, thing in shown(before.pictures.shape[1]):
        said, pair = caption(PAINTED[thing], list(PLACES)[place]), ""
        for result, name in ((before, "SDXL's schedule"), (fixed, "fixed")):
            key = result.run.key
            source = data_uri(enlarged(result.pictures[place, thing]))
            got = cells[key][place]["each"][thing]
            pair += (
                f'<div><img src="{source}" alt="{html.escape(f"{said}: {name}")}"><div class="tag {key}">'
                f"<span>{name}</span><b>{100 * got:.0f} %</b></div></div>"
            )
        parts.append(f'<figure><figcaption>“{said}”</figcaption><div class="pair">{pair}</div></figure>')
    return f'<div class="pairs">{"".join(parts)}</div>'


def _dot(name: str) -> str:
    return f'<svg viewBox="0 0 16 16"><circle class="{name}" cx="8" cy="8" r="6"/></svg>'


_KEY = (
    '<div class="key"><span><svg viewBox="0 0 16 16"><line class="asked" x1="8" x2="8" y1="0" y2="16"/></svg>'
    f"asked</span><span>{_dot('before')}SDXL's schedule</span><span>{_dot('control')}the same, trained on"
    f"</span><span>{_dot('v_alone')}v-prediction alone</span><span>{_dot('fixed')}with the fixes</span></div>"
)


def _chart(numbers: dict[str, Any], quantity: str, places: list[str]) -> str:
    right = _cells(numbers["asked"])
    got = [_cells(run["places"]) for run in numbers["runs"]]
    rows = [
        Dots(place, right[place][quantity], [cells[place][quantity] for cells in got]) for place in places
    ]
    return dot_rows(f"{quantity} asked and got", rows, [run["key"] for run in numbers["runs"]])


def _strips(results: list[Result]) -> str:
    before, fixed = _by_key(results, "before"), _by_key(results, "fixed")
    parts = []
    for row, place in enumerate(PLACES):
        for result in (before, fixed):
            source = data_uri(strip(result.pictures[row]))
            said = html.escape(result.run.label)
            parts.append(
                f'<figure><img src="{source}" alt="{place}: {said}" loading="lazy">'
                f"<figcaption>{place}<span>: {said}</span></figcaption></figure>"
            )
    return "".join(parts)


def _table(numbers: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(run['label'])}</th>" for run in numbers["runs"])
    lines = [f"<tr><th>brightness, %</th><th>asked</th>{head}</tr>"]
    columns = [numbers["asked"], *(run["places"] for run in numbers["runs"])]
    keys = ["", *(run["key"] for run in numbers["runs"])]
    for quantity in ("brightness", "saturation", "contrast"):
        if quantity != "brightness":
            lines.append(f"<tr><th>{quantity}, %</th>{'<th></th>' * len(columns)}</tr>")
        for row, place in enumerate(PLACES):
            if quantity == "saturation" and place not in COLOURS:
                continue
            values = "".join(
                f'<td class="{key}">{100 * column[row][quantity]:.0f}'
                + (f" ± {100 * column[row]['spread']:.0f}" if quantity == "brightness" else "")
                + "</td>"
                for key, column in zip(keys, columns, strict=True)
            )
            lines.append(f"<tr><td>{place}</td>{values}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cells(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {cell["place"]: cell for cell in cells}


def _percent(cell: dict[str, Any]) -> str:
    return f"{100 * cell['brightness']:.0f}\N{NO-BREAK SPACE}%"


def _by_key(results: list[Result], key: str) -> Result:
    return next(result for result in results if result.run.key == key)
