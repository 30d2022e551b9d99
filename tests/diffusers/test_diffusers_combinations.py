"""Conversion with a frozen base, rectified flow, densities, the shift by resolution, perturbation and the
stable loss, together on the made-up script: pairs (slow: triples) against the closed form."""

import copy
import itertools

import pytest
import torch
from closed_form import flow_levels
from combinations import (
    DRAWN,
    FLAGS,
    KEPT,
    LOSS,
    PERTURBED,
    SHIFT,
    SHIFTED,
    TRAINED,
    asked,
    draws,
    known,
    makes_sense,
    right,
    some,
    target,
    weights,
)
from diffusers import UNet2DConditionModel
from made_up_script import environment, model, run

PRIOR = {"alone": [], "prior": ["--with_prior_preservation"]}
FACTORS = (TRAINED, LOSS, weights("--snr_gamma"), DRAWN, SHIFTED, PERTURBED, KEPT, PRIOR)
ROWS = [row for row in itertools.product(*FACTORS) if makes_sense(row[0], row[2], row[3])]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(*flags): the steps that the script recorded, and the calls of the U-Net: what it was given, told,
    whether it is trained by that call, and what it said."""
    folder, calls = tmp_path_factory.mktemp("training"), []
    forward = UNet2DConditionModel.forward

    def noting(self, sample, timestep, *args, **kwargs):
        output = forward(self, sample, timestep, *args, **kwargs)
        said = (output if isinstance(output, tuple) else (output.sample,))[0].detach()
        calls.append((sample.detach(), timestep, torch.is_grad_enabled(), said))
        return output

    def trained(*flags, **base):
        calls.clear()
        return run(folder / "out", model(folder, **base), "--unet", *flags), list(calls)

    with pytest.MonkeyPatch.context() as monkeypatch:
        environment(monkeypatch)
        monkeypatch.setattr(UNet2DConditionModel, "forward", noting)
        yield trained


@pytest.fixture(scope="module")
def frozen(train):
    """The base: the U-Net that the script starts with, in float64."""
    from made_up_sdxl import small_unet

    torch.manual_seed(0)
    return copy.deepcopy(small_unet([])).double().eval()


def check(train, frozen, row):
    trained, loss_name, weight, drawn, shifted, perturbed, kept, prior = row
    parts = [
        factor[name] for factor, name in zip(FACTORS[1:5], (loss_name, weight, drawn, shifted), strict=True)
    ]
    flags = [*FLAGS[trained], *(flag for part in parts for flag in part[0])]
    flags += [*PERTURBED[perturbed], *PRIOR[prior], *(["--keep_base", str(KEPT[kept])] if KEPT[kept] else [])]
    recorded, called = train(*flags)
    (kind, abar), form = TRAINED[trained], {**parts[0][1], **parts[1][1]}
    weigh = draws(abar, **parts[2][1], **parts[3][1])
    assert (
        len(recorded) == 2 and [call[2] for call in called] == ([False, True] if KEPT[kept] else [True]) * 2
    )
    for number, step in enumerate(recorded):
        rows, x0, noise = (step["timesteps"], step["model_input"].double(), step["noise"].double())
        seen = called[number * 2 + 1 if KEPT[kept] else number]
        tells = 1000 * flow_levels(SHIFT if trained == "flow 3" else 1.0)[rows] if kind == "flow" else rows
        assert torch.allclose(seen[1].double(), tells.double(), rtol=1e-6)
        assert torch.equal(seen[0], step["noisy"]) and torch.equal(seen[3], step["model_pred"])
        x, told = asked(x0, noise, (1 / abar[rows] - 1).sqrt())
        with torch.no_grad():
            said = frozen(x, told, torch.zeros(len(x), 1, 8).double()).sample
        if KEPT[kept]:
            knows = known(abar[rows])
            sample, base_told, _, base_said = called[number * 2]
            for ours, papers in ((base_told, told), (sample, x), (base_said, said)):
                assert torch.allclose(ours.double()[knows], papers[knows], rtol=1e-4, atol=2e-3), row
        goal = target(kind, x0, noise, abar[rows], said, KEPT[kept])
        whole = (step["model_pred"], goal, rows, weigh[rows])
        halves = zip(*(part.chunk(2) for part in whole), strict=True) if prior == "prior" else [whole]
        expected = sum(right(trained, *half, **form) for half in halves)
        assert step["loss"].item() == pytest.approx(expected, rel=1e-4), row


def test_pairs_are_the_closed_form(train, frozen):
    for row in some(ROWS, 2, 1500):
        check(train, frozen, row)


@pytest.mark.slow
def test_triples_are_the_closed_form(train, frozen):
    for row in some(ROWS, 3, 3000):
        check(train, frozen, row)
