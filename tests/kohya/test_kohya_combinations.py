"""Conversion with a frozen base, rectified flow, densities, the shift by resolution, ranges, perturbation and
the stable loss, together on the made-up sd-scripts: pairs (slow: triples) against the closed form."""

import itertools
import sys

import pytest
import torch
from closed_form import flow_rows
from combinations import (
    DRAWN,
    FLAGS,
    KEPT,
    LOSS,
    PERTURBED,
    SHIFT,
    SHIFTED,
    TRAINED,
    WATCHED,
    asked,
    draws,
    known,
    makes_sense,
    right,
    some,
    target,
    weights,
)
from made_up_trainer import build, edit, forget, run, steps

WEIGHTS = {name: part for name, part in weights("--min_snr_gamma").items() if name != "soft"}
SCRIPTS = {"full": "sdxl_train.py", "LoRA": "sdxl_train_network.py"}
RANGES = {
    "all": ([], {}),
    "a range": (["--min_timestep", "200", "--max_timestep", "960"], dict(low=200, high=960)),
}
MASKS = {"whole": [], "masked": ["--masked_loss"]}
FACTORS = (TRAINED, LOSS, WEIGHTS, DRAWN, SHIFTED, RANGES, PERTURBED, KEPT, WATCHED, MASKS, SCRIPTS)
LORA = """
        class Low(torch.nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.down, self.up = torch.nn.Conv2d(4, 2, 1), torch.nn.Conv2d(2, 4, 1)
                self.original, layer.forward = layer.forward, self.forward

            def forward(self, x):
                return self.original(x) + self.up(self.down(x))

        unet = SdxlUNet2DConditionModel().requires_grad_(False)
        lora = Low(unet.convolution)
        optimizer = torch.optim.SGD(lora.parameters(), lr=0.01)
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One whose U-Net goes by the timesteps and notes its calls, and whose network is a LoRA."""
    root = build(tmp_path_factory.mktemp("trainer"))
    edit(
        root,
        "library/sdxl_original_unet.py",
        ("class Sdxl", "CALLS = []\n\n\nclass Sdxl"),
        (
            "return self.convolution(x)",
            "output = self.convolution(x) * (1 + timesteps.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)\n"
            "        CALLS.append((x.detach(), timesteps, torch.is_grad_enabled(), output.detach()))\n"
            "        return output",
        ),
    )
    indent = "\n        "
    made = f"        unet = SdxlUNet2DConditionModel(){indent}"
    made += "optimizer = torch.optim.SGD(unet.parameters(), lr=0.01)\n"
    edit(
        root,
        "train_network.py",
        (made, LORA),
        ("unet.convolution.weight.grad", "lora.up.weight.grad"),
    )
    yield root
    forget()


def frozen(x, told):
    """The base: the weights that the scripts start with."""
    torch.manual_seed(0)
    made = torch.nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False)
    return made(x) * (1 + told.reshape(-1, 1, 1, 1) / 1000)


def check(trainer, row):
    trained, loss_name, weight, drawn, shifted, ranged, perturbed, kept, watched, mask, kind = row
    parts = [
        factor[name]
        for factor, name in zip(FACTORS[1:6], (loss_name, weight, drawn, shifted, ranged), strict=True)
    ]
    flags = [*FLAGS[trained], *(flag for part in parts for flag in part[0])]
    flags += [*PERTURBED[perturbed], *WATCHED[watched], *MASKS[mask]]
    flags += ["--keep_base", str(KEPT[kept])] if KEPT[kept] else []
    calls = sys.modules.get("library.sdxl_original_unet")
    if calls is not None and hasattr(calls, "CALLS"):
        calls.CALLS.clear()
    run(trainer, SCRIPTS[kind], *flags, "--max_train_steps", "3")
    form = {**parts[0][1], **parts[1][1]}
    (name, abar), recorded = TRAINED[trained], steps(trainer)
    weigh = draws(abar, **{**parts[2][1], **parts[3][1], **parts[4][1]})
    called = list(sys.modules["library.sdxl_original_unet"].CALLS)
    students = [call for call in called if call[2]]
    teachers = []  # right before the call that is trained
    for before, after in itertools.pairwise([(None, None, True, None), *called]):
        if after[2] and KEPT[kept]:
            teachers.append(before)
    assert len(recorded) == len(students) == 3 and len(teachers) == (3 if KEPT[kept] else 0)
    if not KEPT[kept] and watched == "no":
        assert len(called) == 3
    for number, step in enumerate(recorded):
        told = step["timesteps"]
        rows = told
        if name == "flow":
            rows = flow_rows(told, SHIFT if trained == "flow 3" else 1.0)
            assert told.dtype == torch.float32
        low, high = parts[4][1].get("low", 0), parts[4][1].get("high", 1000)
        assert low <= int(rows.min()) and int(rows.max()) < high
        noisy, seen, _, output = students[number]
        assert torch.equal(seen, told) and torch.equal(noisy, step["noisy"])
        assert torch.equal(output, step["prediction"])
        x0 = step["latents"].double()
        noise = step["noise"].double() + (x0 if name == "flow" else 0)  # flow's target takes its place
        sigma = (1 / abar[rows] - 1).sqrt()
        x, told = asked(x0, noise, sigma)
        said = frozen(x, told)
        if KEPT[kept]:
            sample, base_told, _, base_output = teachers[number]
            knows = known(abar[rows])
            for said_by_us, by_the_papers in ((base_told, told), (sample, x), (base_output, said)):
                assert torch.allclose(
                    said_by_us.double()[knows], by_the_papers[knows], rtol=1e-4, atol=2e-3
                ), row
        goal = target(name, x0, noise, abar[rows], said, KEPT[kept])
        masks = step["masks"]
        if masks is not None:
            masks = masks.double().reshape(-1, 1, 8, 2, 8, 2).mean((3, 5))
        expected = right(
            trained, step["prediction"], goal, rows, weigh[rows], mask=masks, later=step["later"], **form
        )
        assert float(step["loss"]) == pytest.approx(expected, rel=5e-5), row
        assert bool(step["gradient"].isfinite().all()) and float(step["gradient"].abs().max()) > 0


ROWS = [
    row
    for row in itertools.product(*FACTORS)
    if makes_sense(row[0], row[2], row[3], 960 if row[5] == "a range" else 1000)
]


def test_every_pair_is_the_closed_form(trainer):
    for row in some(ROWS, 2, 1500):
        check(trainer, row)


@pytest.mark.slow
def test_every_triple_is_the_closed_form(trainer):
    for row in some(ROWS, 3, 3000):
        check(trainer, row)
