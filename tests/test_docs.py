"""The numbers in docs/ are the code's: every table below is computed and must stand in its page, line for
line.

``python tests/test_docs.py`` prints them all.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pairing
import pytest
import torch

from sdxl_fixes import MinSNR, NoiseSchedule, ScheduledHuber
from sdxl_fixes.densities import Beta, Laplace, LogitNormal, Mode
from sdxl_fixes.loss import huber, l2, smooth_l1
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.weighting import SoftMinSNR

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SDXL = NoiseSchedule.sdxl()
ZTSNR = SDXL.zero_terminal_snr()
PAGES = ("zero-terminal-snr", "min-snr", "huber", "input-perturbation", "timesteps")
EVIDENCE = {
    "zero-terminal-snr": "leak",
    "min-snr": "min-snr",
    "huber": "huber",
    "input-perturbation": "perturbation",
    "timesteps": "leak",
}


def table(header, rows):
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def sigmas():
    """Sigma along the timesteps under every method."""
    made = {
        "SDXL": SDXL,
        **{
            f"300, {method}": SDXL.with_terminal_sigma(300, method)
            for method in ("beta_end", "rescale", "tail", "last")
        },
        "zero terminal SNR": ZTSNR,
    }
    rows = [
        [f"sigma at t = {t}", *(f"{s.sigmas[t]:.4g}" for s in made.values())]
        for t in (499, 750, 900, 998, 999)
    ]
    rows.append(["image left at t = 999, %", *(f"{100 * s.residual_signal:.3g}" for s in made.values())])
    rows.append(
        [
            "timesteps above 14.6",
            *(int((s.sigmas > SDXL.terminal_sigma * (1 + 1e-9)).sum()) for s in made.values()),
        ]
    )
    return table(["", *made], rows)


def leak_of(spread, sigma):
    """(lost share of the mean, remaining share of the spread) of a Gaussian coordinate, sampled exactly from
    plain noise."""
    a = 1 / math.sqrt(1 + sigma**2)
    scale = math.sqrt(a * a * spread * spread + 1 - a * a)
    return spread * a / scale, 1 / scale


CANVASES = {512: 64, 1024: 128, 1536: 192}  # pixels -> latents


def leak():
    """Loss of brightness and what is left of its spread, by canvas and terminal sigma."""
    ends = {
        "14.6": SDXL.terminal_sigma,
        "29.2": 2 * SDXL.terminal_sigma,
        **{str(s): s for s in (100, 300, 4096, 20000)},
        "inf": math.inf,
    }
    rows = []
    for pixels, n in CANVASES.items():
        cells = [leak_of(n / 2, sigma) if sigma < math.inf else (0.0, 1.0) for sigma in ends.values()]
        rows.append(
            [f"{pixels} x {pixels}", n // 2, *(f"{100 * lost:.1f} / {left:.2f}" for lost, left in cells)]
        )
    return table(["canvas", "s", *ends], rows)


def needed():
    """The terminal sigma that loses no more than a given share."""
    rows = [
        [f"{p} x {p}", *(f"{n / 2 * math.sqrt(1 / share**2 - 1):.0f}" for share in (0.5, 0.2, 0.05, 0.01))]
        for p, n in CANVASES.items()
    ]
    return table(["canvas", "50 %", "20 %", "5 %", "1 %"], rows)


def min_snr():
    """v-prediction weights."""
    stale = np.minimum(SDXL.snr, 5) / (
        SDXL.snr + 1
    )  # kohya under --zero_terminal_snr: the SNR of the old schedule
    columns = {
        "SDXL": MinSNR(5).table(SDXL, "v_prediction"),
        "zero terminal SNR": MinSNR(5).table(ZTSNR, "v_prediction"),
        "the same in kohya": stale,
        "with the floor": MinSNR(5, floor=True).table(ZTSNR, "v_prediction"),
        "soft": SoftMinSNR(5).table(ZTSNR, "v_prediction"),
    }
    rows = [
        [f"t = {t}", *(f"{w[t]:.3g}" for w in columns.values())]
        for t in (0, 100, 250, 500, 750, 900, 950, 990, 999)
    ]
    return table(
        ["weight of v", *columns], [*rows, ["mean of all t", *(f"{w.mean():.3f}" for w in columns.values())]]
    )


def deltas():
    """Huber's delta."""
    columns = {
        "constant": ScheduledHuber(schedule="constant").delta(SDXL),
        "exponential": ScheduledHuber(schedule="exponential").delta(SDXL),
        "snr": ScheduledHuber(schedule="snr").delta(SDXL),
        "snr, zero terminal SNR": ScheduledHuber(schedule="snr").delta(ZTSNR),
    }
    rows = [[f"t = {t}", *(f"{d[t]:.3f}" for d in columns.values())] for t in (0, 250, 500, 750, 999)]
    return table(["delta", *columns], rows)


def gradients():
    """The loss's derivative by torch's autograd."""

    def slope(loss, r):
        x = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        loss(x).backward()
        return f"{x.grad:.3g}"

    losses = {"l2": l2, "huber": lambda x: huber(x, 0.1), "smooth_l1": lambda x: smooth_l1(x, 0.1)}
    return table(
        ["r", *losses], [[r, *(slope(loss, r) for loss in losses.values())] for r in (0.01, 0.1, 1.0, 10.0)]
    )


def perturbed():
    """Standard deviation of the perturbed noise."""
    rows = [
        [gamma, f"{math.sqrt(1 + gamma**2):.5f}", f"{math.sqrt(1 + gamma**2 / 3):.5f}"]
        for gamma in (0.05, 0.1, 0.2)
    ]
    return table(["gamma", "fixed", "random"], rows)


def paired():
    """What noise that is the nearest of k draws says of the brightness, with the latents' mean square 1."""
    rows = [
        [f"{100 * share:.1f} %", *(f"{100 * pairing.leak(k, share):.1f} %" for k in (2, 4, 8, 64))]
        for share in (1 / 64, 1 / 16, 1 / 4)
    ]
    return table(["share of the energy in brightness", "k = 2", "4", "8", "64"], rows)


def strata():
    """Independent and stratified draws of an optimizer step, in closed form."""
    rows = []
    for n in (4, 8, 2048):
        miss, spread = f"{100 * 0.9**n:.1f} % / {100 * max(0.0, 1 - n / 10):.1f} %", 1000 / math.sqrt(12 * n)
        rows.append([n, miss, f"{spread:.3g} / {spread / n:.3g}"])
    return table(
        ["samples in a step", "chance of none in the last tenth", "spread of their mean timestep"], rows
    )


def shares():
    """Terminal share: where it goes, and what it weighs."""
    made = {
        "zero terminal SNR": ZTSNR,
        "300, beta_end": SDXL.with_terminal_sigma(300, "beta_end"),
    }
    rows = []
    for name, schedule in made.items():
        for share in (0.3, 0.5):
            sampler = TimestepSampler(schedule, terminal_share=share)
            first = int(np.argmax(sampler.probabilities > sampler.probabilities[0]))
            weights = sampler.weights(torch.tensor([0, first]))
            effective = 1 / float((1000 * sampler.probabilities) ** -1 @ np.full(1000, 1e-3))
            drawn = f"{100 * sampler.probabilities[first:].sum():.1f} %"
            rows.append(
                [
                    name,
                    f"{first} to 999",
                    share,
                    drawn,
                    *(f"{float(w):.3f}" for w in weights.flip(0)),
                    f"{effective:.2f}",
                ]
            )
    return table(
        [
            "schedule",
            "timesteps",
            "share asked",
            "drawn there",
            "weight there",
            "elsewhere",
            "effective samples",
        ],
        rows,
    )


DENSITIES = {
    "uniform in $t$": None,
    "`logit_normal`": LogitNormal(),
    "`laplace`": Laplace(),
    "`mode`": Mode(),
    "`beta`": Beta(),
}


def densities():
    """Where draws go by sigma, and what weights leave of them."""
    edges, rows = [0, 0.1, 0.5, 2, SDXL.terminal_sigma * (1 + 1e-9), np.inf], []
    for name, density in DENSITIES.items():
        p = TimestepSampler(ZTSNR, density=density).probabilities
        bins = [p[(ZTSNR.sigmas > a) & (ZTSNR.sigmas <= b)].sum() for a, b in itertools.pairwise(edges)]
        options = dict(density=density, weighted=True, uniform_share=0.1) if density else {}
        left = TimestepSampler(ZTSNR, **options).effective
        last = 1000 * p[-1]  # times as often as uniform draws
        rows.append([name, *(f"{100 * share:.3g} %" for share in bins), f"{last:.2g}", f"{left:.2f}"])
    headings = ["to 0.1", "to 0.5", "to 2", "to 14.6", "above", "last timestep, of uniform's", "left"]
    return table(["sigma", *headings], rows)


TABLES = {
    "zero-terminal-snr": (sigmas, leak, needed),
    "min-snr": (min_snr,),
    "huber": (deltas, gradients),
    "input-perturbation": (perturbed, paired),
    "timesteps": (strata, shares, densities),
}


@pytest.mark.parametrize(("page", "make"), [(page, make) for page, makes in TABLES.items() for make in makes])
def test_the_table_in_the_page_is_the_codes(page, make):
    assert "\n".join(make()) in (DOCS / f"{page}.md").read_text(encoding="utf-8")


def test_the_closed_form_of_the_leak_is_the_one_that_the_schedulers_page_measures():
    page = (DOCS / "schedulers.md").read_text()
    by_sigma = page.split("## Brightness by terminal sigma")[1]
    for name, sigma in (("14.6", SDXL.terminal_sigma), ("100 beta_end", 100), ("300 rescale", 300)):
        lost = re.search(rf"^\| {name} \| ([\d.]+) % \|", by_sigma, re.M)[1]
        assert float(lost) == pytest.approx(100 * leak_of(64, sigma)[0], abs=0.06)
    stock = page.split("to 14.6, 25 steps")[1]
    spread, lost = re.search(r"^\| \*ideal\* .*\| ([\d.]+) \| ([\d.]+) % \|$", stock, re.M).groups()
    expected = leak_of(64, SDXL.terminal_sigma)
    assert (float(lost) / 100, float(spread)) == pytest.approx(expected, abs=0.006)


def said(page):
    return " ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split())


def test_the_numbers_in_the_sentences_are_the_codes():
    ends = said("zero-terminal-snr")
    assert f"{SDXL.residual_signal:.4f}$: {100 * SDXL.residual_signal:.2f} % of the image" in ends
    assert f"--height 1024`: {SDXL.for_resolution(1024, 1024).terminal_sigma:.1f}." in ends
    assert f"the loss of 512 x 512, {100 * leak_of(32, SDXL.terminal_sigma)[0]:.0f} %," in ends
    left = torch.from_numpy(SDXL.alphas_cumprod.copy()).to(
        torch.bfloat16
    )  # diffusers' add_noise on bfloat16 latents
    multipliers = ((1 - left) ** 0.5).tolist()
    values = (
        f"the noise's multiplier takes {len(set(multipliers))} values in 1000 timesteps, and is 0 at "
        f"{multipliers.count(0)}"
    )
    assert values in ends and values in said("recipes")
    means = [MinSNR(5, floor).table(ZTSNR, "v_prediction").mean() for floor in (False, True)]
    assert "mean weight rises from {:.3f} to {:.3f}".format(*means) in said("min-snr")
    assert f"terminal step gets {MinSNR(5).table(SDXL, 'v_prediction')[-1]:.4f} by mistake" in said("min-snr")


def told():
    """What SDXL is told of rectified flow's noise, and what it was trained to be told of as much."""
    rows = []
    for s in (0.1, 0.25, 0.5, 0.75, 0.9):
        t = np.interp(math.log(s / (1 - s)), np.log(SDXL.sigmas), np.arange(1000))
        rows.append([s, round(1000 * s), f"{t:.1f}", f"{math.hypot(s, 1 - s):.3f}"])
    return [f"| {' | '.join(map(str, row))} |" for row in rows]


def test_the_page_on_flow_says_what_sdxl_is_told_wrongly_and_what_it_never_saw():
    page = (DOCS / "flow.md").read_text(encoding="utf-8")
    assert "\n".join(told()) in page
    end = SDXL.terminal_sigma / (1 + SDXL.terminal_sigma)
    shares = [(NoiseSchedule.flow(shift).sigmas > SDXL.terminal_sigma).mean() for shift in (1, 3, 6)]
    low, *high = (100 * share for share in shares)
    said = f"Above $s={end:.3f}$ SDXL knows nothing: {low:.1f} % of the draws at shift 1, "
    assert said + f"{high[0]:.0f} % at 3, {high[1]:.0f} % at 6" in page


@pytest.mark.parametrize("draws", [4, 16])
def test_stratified_draws_are_as_even_as_the_page_says(draws):
    sampler = TimestepSampler(SDXL, stratified=True)
    steps = torch.stack([sampler.draw(draws) for _ in range(4000)]).double()
    assert float((steps < 900).all(1).double().mean()) == pytest.approx(max(0.0, 1 - draws / 10), abs=0.03)
    assert float(steps.mean(1).std()) == pytest.approx(1000 / math.sqrt(12) / draws**1.5, rel=0.05)


def test_kohyas_versions_and_scripts_are_those_of_the_adapters_data():
    from sdxl_fixes.kohya.scripts import REFUSED, SCRIPTS, TESTED

    page, readme = (DOCS / "kohya.md").read_text(), (ROOT / "README.md").read_text()
    for version in TESTED.values():
        assert version in readme.split("## With kohya-ss")[1].split("\n")[0] and version in page
    rows = [
        f"| `{script}` | {', '.join(no_place)} |".replace("|  |", "| |")
        for script, no_place in SCRIPTS.items()
    ]
    assert "\n".join(rows) in page and "sdxl_train_leco.py" in REFUSED


@pytest.mark.parametrize("page", PAGES)
def test_the_page_fits_and_points_to_its_evidence(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert f"(evidence/{EVIDENCE[page]}.md)" in text.split("\n## Evidence\n")[1]


@pytest.mark.parametrize("page", [*(f"docs/{page}.md" for page in EVIDENCE), "README.md"])
def test_measured_numbers_are_those_of_the_generated_pages(page):
    measured = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "evidence").glob("*.md"))
    quoted = re.findall(r"[+-]?\d+(?:\.\d+)?\s±\s\d+(?:\.\d+)?", (ROOT / page).read_text(encoding="utf-8"))
    assert len(quoted) >= 2
    for number in quoted:
        assert re.search(rf"(?<![\d.]){re.escape(' '.join(number.split()))}(?!\d)", measured), number


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in (*DOCS.glob("*.md"), *ROOT.glob("*.md")))
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" in target:
            continue
        assert ((ROOT / page).parent / target).exists(), target


if __name__ == "__main__":
    for page, makes in TABLES.items():
        for make in makes:
            print(f"\n{page}: {make.__name__}", *make(), sep="\n")
