"""The demo's report: results.json, one HTML page with its pictures inside, and one picture for the README.
Every verdict is computed."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from sdxl_fixes.atomic import replacing
from sdxl_fixes.demo.experiment import Result
from sdxl_fixes.demo.settings import CANVAS, CAPTIONS, GREY, SPREAD, UNIT, DemoSettings
from sdxl_fixes.schedule import NoiseSchedule

COLOURS = {
    "stock_epsilon": "#e59866",
    "fixed_epsilon": "#935116",
    "stock_v": "#c0392b",
    "longer_v": "#d98880",
}
COLOURS |= {"fixed_v": "#7fb3d5", "ztsnr_v": "#1f618d"}
NEAR = 0.5  # half of the step from one caption to the next
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%;display:block;margin:1rem 0}pre{overflow-x:auto;background:#f4f4f4;padding:.8rem;font-size:13px}h2{margin-top:2rem}"""


def write_report(
    settings: DemoSettings, results: list[Result], seconds: float, output: Path
) -> dict[str, Any]:
    """Write the three files of finished runs. Returns the content of results.json."""
    numbers = summarize(settings, results, seconds)
    files = {
        "demo.png": picture(results),
        "report.html": page(numbers, results, table(numbers)).encode(),
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


def summarize(settings: DemoSettings, results: list[Result], seconds: float) -> dict[str, Any]:
    """The content of results.json. Everything but "timing" and "versions" is a function of the settings."""
    runs = []
    for result in results:
        schedule = result.variant.schedule
        measured = zip(CAPTIONS.items(), result.brightness, result.contrast, strict=True)
        captions = [
            {
                "caption": caption,
                "asked": asked,
                "got": float(np.mean(got)),
                "spread": _spread(got),
                "each": got,
                "contrast": contrast,
            }
            for (caption, asked), got, contrast in measured
        ]
        misses = [
            abs(float(np.mean(got)) - asked)
            for asked, got in zip(CAPTIONS.values(), result.brightness, strict=True)
        ]
        runs.append(
            {
                "key": result.variant.key,
                "label": result.variant.label,
                "prediction_type": result.variant.prediction_type,
                "schedule": repr(schedule),
                "terminal_sigma": schedule.terminal_sigma
                if math.isfinite(schedule.terminal_sigma)
                else "inf",
                "residual_signal": schedule.residual_signal,
                "captions": captions,
                "miss": float(np.mean(misses)),
                "final_loss": result.final_loss,
                "losses": result.losses,
            }
        )
    return {
        "settings": {**asdict(settings), "widths": list(settings.widths)},  # as JSON gives it back
        "canvas": CANVAS,
        "parameters": results[0].parameters,
        "runs": runs,
        "timing": {"total_seconds": seconds, **{result.variant.key: result.seconds for result in results}},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def table(numbers: dict[str, Any]) -> str:
    """The plain-text table of a results.json: brightness got, mean and spread, under each brightness
    asked."""
    settings, empty = numbers["settings"], ""
    lines = [
        f"{empty:<30}" + "".join(f"{caption:>18}" for caption in CAPTIONS),
        f"{'brightness asked':<30}"
        + "".join(f"{asked:>11.2f}{empty:>7}" for asked in CAPTIONS.values())
        + f"{'mean miss':>12}{'final loss':>12}",
    ]
    for row in numbers["runs"]:
        got = "".join(f"{cell['got']:>11.2f} ±{cell['spread']:>5.2f}" for cell in row["captions"])
        lines.append(f"{row['label']:<30}{got}{row['miss']:>12.2f}{row['final_loss']:>12.3f}")
    lines.append(
        "Brightness: 0 is middle grey, 1 a quarter of the way from black to white; ± is the spread "
        "over the generated pictures."
    )
    lines.append(
        f"{settings['samples']} pictures per caption, {settings['steps']} training steps on the stock "
        "schedule, "
        f"{settings['finetuning_steps']} of finetuning, seed {settings['seed']}."
    )
    return "\n".join(lines)


def _spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def picture(results: list[Result]) -> bytes:
    """PNG for the README: SDXL's own training, then v-prediction instead, then zero terminal SNR with it."""
    rows = [
        result
        for key in ("stock_epsilon", "longer_v", "ztsnr_v")
        for result in results
        if result.variant.key == key
    ]
    return _grid(rows, columns=3, dpi=72)  # noise packs badly: under 400 kB


def page(numbers: dict[str, Any], results: list[Result], table: str) -> str:
    """The whole report as HTML that asks for nothing outside itself. ``table`` is the plain-text table of
    ``numbers``."""
    settings, canvas, stock = numbers["settings"], numbers["canvas"], NoiseSchedule.sdxl()
    zero = next(row for row in numbers["runs"] if row["key"] == "ztsnr_v")
    # What the stock schedule's last training step shows of a picture's mean, and how far noise alone moves
    # that mean
    brightest = max(cell["asked"] for cell in zero["captions"])
    signal, noise = stock.residual_signal * brightest, float(stock.sqrt_one_minus_alphas_cumprod[-1]) / canvas
    body = f"""<h1>sdxl-fixes demo: what the noise schedule does to brightness</h1>
<h2>What is wrong</h2>
<p>A diffusion model is trained to remove noise, and it generates by starting from pure noise. SDXL's schedule never trains it on pure
noise: at its noisiest step {stock.residual_signal:.1%} of the picture is still there (sigma {stock.terminal_sigma:.1f}).</p>
<p>That sounds little, but over a whole canvas of {canvas} x {canvas} latent pixels the noise averages out. In the canvas's mean, a
picture of brightness {brightest:g} still shows as {signal:.3f}, and noise moves that mean by {noise:.4f} only: the picture is
{signal / noise:.0f} times as strong. So the model can read the brightness from its input, and need not learn it from the caption. When it
generates, the input is pure noise, whose mean is 0: as far as the model trusts its input, it gets a brightness nobody asked for. How far it
does so in this run is measured below.</p>
<h2>What the fix does</h2>
<p>Zero terminal SNR (arXiv:2305.08891) shifts the schedule so that the last step is pure noise, in training and in generation alike.
There the model has only the caption to go by. It needs v-prediction: to predict the noise in pure noise teaches nothing about pictures.
Share of the picture at the last step: {stock.residual_signal:.4f} with the stock schedule, {zero["residual_signal"]:.4f} with the fixed
one.</p>
{_image(_schedules(results), "residual signal and sigma of the schedules")}
<h2>What came out</h2>
<ul>{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdicts(numbers))}</ul>
{_image(_grid(results, columns=3), "generated pictures: one row per run, one column per caption")}
{_image(_brightness(numbers), "brightness asked and got")}
<pre>{html.escape(table)}</pre>
{_image(_losses(numbers), "training losses")}
<p>Losses of different prediction types or schedules measure different tasks, so do not compare their heights. The brightness is the
measurement.</p>
<h2>How it was measured</h2>
<p>Network: diffusers' UNet2DConditionModel, SDXL's class and structure, with {numbers["parameters"] / 1e6:.1f} million parameters. Runs
of the same length (seed {settings["seed"]}) see the same photos, noise and timesteps in the same order: {settings["steps"]} steps of
{settings["batch"]} photos on the stock schedule, and {settings["finetuning_steps"]} more from there on another schedule or, for comparison,
on the same. Only prediction type and schedule differ. Generation: DPM-Solver++ (2M) on the schedule that was trained last,
{settings["sampling_steps"]} steps, no guidance, {settings["samples"]} pictures per caption, from the same starting noise in every run and
for every caption.</p>
<p>Photos: random crops of the photographs inside the scikit-image package, in black and white, exposed so that the means of the photos
under one caption spread by {SPREAD} around what it says, since captions do not say everything. Brightness 0 is middle grey, and 1 is a
quarter of the way from black to white. There are no VAE and no text encoder offline: the latents are the photo's own pixels, turned into
64 channels of 8 x 8 by the 8 x 8 cosine transform of JPEG (a rotation: nothing is lost and white noise stays white), and each caption
word is a frozen random vector.</p>
<p>Epsilon-prediction cannot generate from a terminal SNR of 0, so a terminal sigma of 300 stands in for it where both prediction types
are compared. Even so, epsilon-prediction multiplies the network's error by that sigma in the first step of generation; v-prediction does
not.</p>
<p>A training of minutes is too short to judge pictures by their detail: judge the brightness. This shows the mechanism on one tiny
network; it does not say how strong the effect is in SDXL itself.</p>"""
    head = f'<meta charset="utf-8"><title>sdxl-fixes demo</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def verdicts(numbers: dict[str, Any]) -> list[str]:
    """What the numbers say: the schedule judged with the prediction type held fixed, then the reverse."""
    runs = {row["key"]: row for row in numbers["runs"]}
    pairs = (
        (
            "With v-prediction, finetuning with zero terminal SNR instead of the stock schedule",
            "longer_v",
            "ztsnr_v",
        ),
        (
            "With v-prediction, finetuning to a terminal sigma of 300 instead of the stock schedule",
            "longer_v",
            "fixed_v",
        ),
        (
            "With epsilon-prediction, finetuning to a terminal sigma of 300 afterwards",
            "stock_epsilon",
            "fixed_epsilon",
        ),
        ("With the stock schedule, v- instead of epsilon-prediction", "stock_epsilon", "stock_v"),
        ("With a terminal sigma of 300, v- instead of epsilon-prediction", "fixed_epsilon", "fixed_v"),
    )
    sentences = []
    for what, before, after in pairs:
        old, new = runs[before]["miss"], runs[after]["miss"]
        change = "hardly changes" if abs(new - old) < 0.05 else ("lowers" if new < old else "raises")
        sentences.append(
            f"{what} {change} the mean distance between brightness asked and got: {old:.2f} "
            f"without, {new:.2f} with."
        )
    for row in runs.values():
        misses = [abs(got - cell["asked"]) for cell in row["captions"] for got in cell["each"]]
        near = sum(miss < NEAR for miss in misses)
        sentences.append(
            f"{row['label']}: {near} of {len(misses)} pictures came within {NEAR} of the brightness asked."
        )
    return sentences


# ---------------------------------------------------------------- pictures


def _grid(results: list[Result], columns: int, dpi: int = 110) -> bytes:
    """Rows are runs, columns captions; ``columns`` samples side by side in each cell, labelled with
    brightness asked and got."""
    figure = _figure(9, (2.6 / columns + 0.45) * len(results) + 0.3)
    axes = figure.subplots(len(results), len(CAPTIONS), squeeze=False)
    for row, result in enumerate(results):
        for column, (caption, asked) in enumerate(CAPTIONS.items()):
            axis = axes[row][column]
            tiles = [GREY + UNIT * tile.numpy() for tile in result.pictures[column][:columns]]
            axis.imshow(
                np.clip(np.concatenate(tiles, 1), 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            got = float(np.mean(result.brightness[column]))
            title = f"asked {asked:+.1f}, got {got:+.2f}"
            axis.set_title(f'"{caption}"\n{title}' if row == 0 else title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(textwrap.fill(result.variant.label, 16), fontsize=7)
    return _png(figure, dpi)


def _brightness(numbers: dict[str, Any]) -> bytes:
    figure = _figure(6, 4)
    axis = figure.subplots()
    asked = [cell["asked"] for cell in numbers["runs"][0]["captions"]]
    axis.plot(asked, asked, color="black", linestyle=":", label="as asked")
    for row in numbers["runs"]:
        got, spread = ([cell[name] for cell in row["captions"]] for name in ("got", "spread"))
        axis.errorbar(
            asked, got, yerr=spread, marker="o", capsize=3, color=COLOURS[row["key"]], label=row["label"]
        )
    axis.set(xlabel="brightness asked", ylabel="brightness got (bars: spread)")
    axis.set_ylim(-3, 3)  # a diverged run must not flatten the others
    axis.legend(fontsize=8)
    return _png(figure)


def _losses(numbers: dict[str, Any]) -> bytes:
    figure = _figure(7, 3)
    axis = figure.subplots()
    for row in numbers["runs"]:
        window = min(20, len(row["losses"]))
        smooth = np.convolve(row["losses"], np.ones(window) / window, "valid")
        axis.plot(np.arange(len(smooth)) + window, smooth, color=COLOURS[row["key"]], label=row["label"])
    axis.set(xlabel="training step", ylabel=f"loss, mean of {window} steps", yscale="log")
    axis.legend(fontsize=8)
    return _png(figure)


def _schedules(results: list[Result]) -> bytes:
    figure = _figure(9, 3)
    signal, sigma = figure.subplots(1, 2)
    for key in ("stock_v", "fixed_v", "ztsnr_v"):
        for result in (result for result in results if result.variant.key == key):
            schedule = result.variant.schedule
            style = {
                "color": COLOURS[key],
                "label": result.variant.label.removeprefix("v, ").removeprefix("then "),
            }
            signal.plot(schedule.sqrt_alphas_cumprod, **style)
            finite = schedule.sigmas[np.isfinite(schedule.sigmas)]
            sigma.plot(finite, **style)
    signal.set(xlabel="timestep", ylabel="share of the picture left")
    sigma.set(xlabel="timestep", ylabel="sigma (the last may be infinite)", yscale="log")
    signal.legend(fontsize=8)
    sigma.legend(fontsize=8)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _image(png: bytes, description: str) -> str:
    return (
        f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )
