"""What is measured of generated pictures, beside what training pictures of the same captions have."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from dataclasses import asdict
from typing import Any

import diffusers
import torch

from sdxl_fixes.demo.finetune import Result, painted
from sdxl_fixes.demo.plan import Plan
from sdxl_fixes.demo.world import CANVAS, DATA, PLACES, fold, load_world, unfold

BORDER = 2  # pixels: no object reaches so far out (tests/demo)
TRAINING = 256  # training pictures per place that say what was asked


def background(pictures: torch.Tensor) -> torch.Tensor:
    """Mean colour of the border, 0 (black) to 1, of [..., 3, CANVAS, CANVAS] in -1 to 1: [..., 3]."""
    inside = slice(BORDER, CANVAS - BORDER)
    border = torch.ones(CANVAS, CANVAS, dtype=torch.bool)
    border[inside, inside] = False
    return ((pictures[..., border] + 1) / 2).mean(-1)


def measure(pictures: torch.Tensor) -> list[dict[str, Any]]:
    """One dict per place of [places, pictures, 3, CANVAS, CANVAS]: the background's mean "brightness" (0
    black, 1 white), its "spread" over pictures and "each" picture's; its "saturation" (largest less smallest
    of red, green and blue); the "contrast" in a picture (standard deviation of its brightness)."""
    colour = background(pictures.double())
    brightness = colour.mean(-1)
    mean = colour.mean(1)
    contrast = pictures.double().mean(2).flatten(2).std(-1) / 2
    return [
        {
            "place": place,
            "brightness": float(brightness[row].mean()),
            "spread": float(brightness[row].std()) if brightness.shape[1] > 1 else 0.0,
            "each": brightness[row].tolist(),
            "saturation": float(mean[row].max() - mean[row].min()),
            "contrast": float(contrast[row].mean()),
        }
        for row, place in enumerate(PLACES)
    ]


def asked(plan: Plan) -> list[dict[str, Any]]:
    """The same of training pictures: what each caption asks for, as far as latents can hold it."""
    more = dataclasses.replace(plan, pictures=TRAINING)
    pictures = load_world().pictures(*painted(more), torch.Generator().manual_seed(plan.seed + 2000))
    latents = fold(pictures)
    return measure(unfold(latents).clamp(-1, 1).reshape(len(PLACES), TRAINING, 3, CANVAS, CANVAS))


def summarize(plan: Plan, results: list[Result], seconds: float) -> dict[str, Any]:
    """The content of results.json. Everything but "timing" and "versions" is a function of the plan, the
    checkpoint and the machine's arithmetic."""
    rows, right = [], asked(plan)
    for result in results:
        places, schedule = measure(result.pictures), result.run.schedule
        sigma = schedule.terminal_sigma
        rows.append(
            {
                "key": result.run.key,
                "label": result.run.label,
                "prediction_type": result.run.prediction_type,
                "terminal_sigma": sigma if math.isfinite(sigma) else "inf",
                "residual_signal": schedule.residual_signal,
                "places": places,
                "miss": _miss(right, places),
                "losses": result.losses,
            }
        )
    weights = (DATA / "tiny-sdxl" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return {
        "plan": asdict(plan),
        "checkpoint": hashlib.sha256(weights).hexdigest()[:12],
        "asked": right,
        "runs": rows,
        "timing": {"total_seconds": seconds, **{result.run.key: result.seconds for result in results}},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def _miss(asked: list[dict[str, Any]], got: list[dict[str, Any]]) -> float:
    """Mean distance between the brightness asked and got, over places."""
    pairs = zip(asked, got, strict=True)
    misses = [abs(wanted["brightness"] - cell["brightness"]) for wanted, cell in pairs]
    return float(sum(misses)) / len(misses)
