"""Full finetuning with weights in 16 bits: rounded to nearest, rounded stochastically, with Kahan sums,
against float32.

python benchmarks/precision.py --jobs 1     about 12 minutes of one core; writes docs/evidence/precision.md

Needs the optimizers of `pip install torchao torch-optimi`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import digits
import lab
import torch
from torch.func import functional_call

from sdxl_fixes import Objective
from sdxl_fixes.atomic import replacing
from sdxl_fixes.validation import Validation

OBJECTIVE = Objective(lab.STOCK.zero_terminal_snr(), "v_prediction")
STEPS, BATCH, WIDTH, RATE, CONTROL_RATE = 2000, 32, 32, 1e-5, 1e-3
HELD_OUT = 200
Optimizer = torch.optim.Optimizer


def torchao(name: str, weights: Any, **options: Any) -> Optimizer:
    """One of torchao's: rounds what it writes into bfloat16 weights stochastically, unless told not to."""
    import torchao.optim

    options = {"bf16_stochastic_round": True, **options}  # of float32 weights it rounds nothing
    return getattr(torchao.optim, name)(weights, **options)  # type: ignore[no-any-return]


def optimi(weights: Any, **options: Any) -> Optimizer:
    """AdamW that keeps what rounding took from 16-bit weights, and adds it to the next step (Kahan sums)."""
    import optimi

    return optimi.AdamW(weights, **options)


@dataclass(frozen=True)
class Variant:
    """Where weights, gradients and the states that follow them are kept, and by whom they are changed."""

    dtype: torch.dtype
    optimizer: Callable[..., Optimizer]
    options: dict[str, Any] = field(default_factory=dict)  # what differs from betas 0.9, 0.999 and eps 1e-8
    rate: float = RATE


SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
ADAMW: Callable[..., Optimizer] = torch.optim.AdamW
STOCHASTIC = partial(torchao, "_AdamW")
VARIANTS = {
    "float32": Variant(SINGLE, ADAMW),
    "bfloat16, to nearest": Variant(BRAIN, ADAMW),
    "bfloat16, stochastic": Variant(BRAIN, STOCHASTIC),
    "bfloat16, Kahan": Variant(BRAIN, optimi),
    "8-bit states, stochastic": Variant(BRAIN, partial(torchao, "AdamW8bit")),
    "8-bit states, to nearest": Variant(BRAIN, partial(torchao, "AdamW8bit", bf16_stochastic_round=False)),
    "8-bit states, float32 weights": Variant(SINGLE, partial(torchao, "AdamW8bit")),
    "4-bit states, stochastic": Variant(BRAIN, partial(torchao, "AdamW4bit")),
    "float16, eps 1e-8": Variant(HALF, ADAMW),
    "float16, eps 1e-4": Variant(HALF, ADAMW, {"eps": 1e-4}),
    "float32, rate 1e-3": Variant(SINGLE, ADAMW, rate=CONTROL_RATE),
    "bfloat16, to nearest, rate 1e-3": Variant(BRAIN, ADAMW, rate=CONTROL_RATE),
}


def turned(images: torch.Tensor) -> torch.Tensor:
    """What is finetuned on: digits [N, 1, 8, 8] turned by a quarter."""
    return images.rot90(1, (2, 3))


def base(seed: int, work: Path) -> digits.Network:
    """A network trained on upright digits in float32; kept in ``work``."""
    network, path = digits.Network(WIDTH), work / f"precision-{WIDTH}-{seed}.pt"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        data = digits.Digits(seed)

        def batch(generator: torch.Generator) -> tuple[torch.Tensor, tuple[Any, ...]]:
            index = torch.randint(digits.TRAINED, (digits.BATCH,), generator=generator)
            return data.images[index], (data.classes[index],)

        torch.manual_seed(seed)
        trained = digits.train_network(digits.Network(WIDTH), OBJECTIVE, batch, seed, digits.STEPS)
        with replacing(path) as file:
            torch.save(trained.state_dict(), file)
    network.load_state_dict(torch.load(path))
    return network


def views(network: torch.nn.Module, vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network's weights, as views of one vector: an elementwise optimizer does not see the difference,
    and takes one call in place of forty."""
    named = dict(network.named_parameters())
    parts = vector[: sum(p.numel() for p in named.values())].split([p.numel() for p in named.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def work(job: lab.Job, folder: Path) -> dict[str, Any]:
    torch.compiler.set_stance("force_eager")  # torchao compiles its steps; the numbers are the same
    variant, data, network = VARIANTS[job.key], digits.Digits(job.seed), base(job.seed, folder)
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach().to(variant.dtype)
    start = torch.nn.functional.pad(start, (0, -len(start) % 256))  # whole blocks of torchao's
    vector = torch.nn.Parameter(start.clone())
    optimizer = variant.optimizer(
        [vector], **{"lr": variant.rate, "betas": (0.9, 0.999), "eps": 1e-8, **variant.options}
    )
    images, before = turned(data.images), held_out(network, start, data)
    generator = torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)  # stochastic rounding draws from the global generator
    compute, finite = HALF if variant.dtype is HALF else BRAIN, STEPS
    for number in range(STEPS):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        step = OBJECTIVE.draw(images[index], generator=generator)
        with torch.autocast("cpu", compute):  # as kohya's --mixed_precision: the same in float32 weights
            inputs = (step.noisy.to(variant.dtype), step.timesteps.float(), data.classes[index])
            prediction = functional_call(network, views(network, vector), inputs)
        OBJECTIVE.loss(prediction.float(), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number < 10 and not vector.isfinite().all():
            finite = number
            break
    moved = float((vector != start).double().mean())
    after = held_out(network, vector.detach(), data)
    return {
        "before": before,
        "after": after if math.isfinite(after) else None,
        "moved": moved,
        "finite": finite,
    }


def held_out(network: digits.Network, vector: torch.Tensor, data: digits.Digits) -> float:
    """The validation loss on turned digits that were not trained on, computed in float32."""
    images, classes = turned(data.held_out)[:HELD_OUT], data.held_out_classes[:HELD_OUT]
    weights = views(network, vector.float())

    def predict(noisy: torch.Tensor, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return functional_call(network, weights, (noisy, t, classes[image]))  # type: ignore[no-any-return]

    return Validation(OBJECTIVE)(predict, images, [network], batch_size=500)["loss"]


def page(found: dict[str, list[Any]]) -> list[str]:
    lines = [
        "# Weights in 16 bits, measured",
        "",
        f"Generated by `benchmarks/precision.py`; {lab.about('precision')}.",
        "A network of scikit-learn's digits, trained in float32, is finetuned on digits turned by a quarter:",
        f"{STEPS:,} steps of {BATCH} with AdamW at a learning rate of {RATE:g}, v-prediction on zero",
        "terminal SNR, the network's arithmetic under autocast. A row differs from the first in where",
        "weights, gradients and states are kept, and in who changes them: "
        "torch's AdamW, torchao's (stochastic), "
        "optimi's (Kahan), in torchao 0.18.0 and torch-optimi 0.3.3. "
        "`loss` is on digits that were not trained on, in float32; `gain` the share of "
        "what float32 gained; `moved` the share of the weights that ended elsewhere. Rows with a rate are "
        "the control: if rounding is what stalls, it must not where steps are large.",
        "",
        "| | loss before | loss after | gain, % | moved, % |",
        "|---|---|---|---|---|",
    ]
    for key, results in found.items():
        single = found["float32, rate 1e-3" if key.endswith("rate 1e-3") else "float32"]
        before = lab.show([r["before"] for r in results], 3)
        if any(r["after"] is None for r in results):
            steps = max(r["finite"] for r in results) + 1
            lines.append(f"| {key} | {before} | NaN by step {steps} | | |")
            continue
        gained = [
            100 * (r["before"] - r["after"]) / (s["before"] - s["after"])
            for r, s in zip(results, single, strict=True)
        ]
        moved = [100 * r["moved"] for r in results]
        after = lab.show([r["after"] for r in results], 3)
        lines.append(f"| {key} | {before} | {after} | {lab.show(gained, 1)} | {lab.show(moved, 1)} |")
    return [*lines, "", *verdict(found)]


def verdict(found: dict[str, list[Any]]) -> list[str]:
    """What the table says, and how far that goes."""

    def worse(key: str, than: str = "float32") -> str:
        pairs = zip(found[key], found[than], strict=True)
        return lab.change([mine["after"] - other["after"] for mine, other in pairs], 3)

    number = sum(parameter.numel() for parameter in digits.Network(WIDTH).parameters())
    return [
        "Loss after training less float32's, seed by seed (bold where the interval excludes 0):",
        f"to nearest {worse('bfloat16, to nearest')}, stochastic {worse('bfloat16, stochastic')},",
        f"Kahan {worse('bfloat16, Kahan')}; stochastic with 8-bit states",
        f"{worse('8-bit states, stochastic')}, with 4-bit states {worse('4-bit states, stochastic')}.",
        "",
        "**Rounded to nearest, a finetune at a small rate stalls**: nearly all weights end where they began.",
        "The control says that it is the size of the steps, and not bfloat16's arithmetic or states: at a",
        "hundred times the rate the same optimizer learns nearly all that float32 learns. **Rounded",
        "stochastically, nothing is lost**; Kahan sums lose a little (why was not looked into).",
        "",
        "8-bit states gain more than float32's. That is no merit of the rounding: with float32 weights",
        f"the loss is {worse('8-bit states, float32 weights')} beside float32's, too, and rounded to",
        "nearest they stall as well. They are another optimizer, whose best rate may be another.",
        "",
        f"Range: one network of {number:,} weights, {STEPS:,} steps, AdamW, one constant rate beside the",
        "control's, no clipping. What rounding to nearest loses hangs on the size of steps beside that of",
        "weights; how much a finetune of SDXL loses by it was not measured. Settings that round",
        "stochastically, and what each keeps in memory: [recipes](../recipes.md#in-kohya).",
    ]


KEYS = list(VARIANTS)


if __name__ == "__main__":
    lab.experiment("precision", __doc__, work, KEYS, page)
