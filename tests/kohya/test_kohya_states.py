"""States of a training that draws by a density, stratified, on flow's schedule: resumed they go on where they
stood, on no other schedule."""

import argparse
import json

import pytest
import torch

from sdxl_fixes.errors import FixError
from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.run import SESSION
from sdxl_fixes.trainers.states import RECORD, load_state, save_state

FLOW = dict(
    prediction_type="flow_prediction",
    flow_shift=3.0,
    stratified_timesteps=True,
    timestep_density="logit_normal",
    timestep_uniform_share=0.1,
    resolution_shift=1024,
    keep_base=0.5,
    network_module="x",
    network_train_unet_only=True,
    seed=7,
)


@pytest.fixture
def begin():
    """begin(**flags): a run of kohya's arguments."""

    def begun(**flags):
        SESSION.begin(kohya_run.start(argparse.Namespace(**flags), OURS))
        return SESSION.run

    yield begun
    SESSION.reset()


def drawn(run, steps):
    found = []
    for _ in range(steps):
        found.append(run.timesteps.draw(4, size=(96, 96)))
        run.timesteps.end_of_step()
    return torch.stack(found)


def test_draws_go_on_and_another_flow_is_refused(begin, tmp_path):
    whole = drawn(begin(**FLOW), 5)
    assert torch.equal(drawn(begin(**FLOW), 3), whole[:3])
    save_state(SESSION, lambda accelerator, folder: None, None, str(tmp_path))
    state = json.loads((tmp_path / RECORD).read_text())
    assert state["prediction_type"] == "flow_prediction" and state["timesteps"]["drawn"] == 3
    run = begin(**FLOW)
    load_state(SESSION, lambda accelerator, folder: None, None, str(tmp_path))
    assert torch.equal(drawn(run, 2), whole[3:])
    for other in (dict(flow_shift=1.0), dict(prediction_type="v_prediction", flow_shift=None)):
        begin(**{**FLOW, **other})
        with pytest.raises(FixError, match=r"was trained with flow_prediction on .* resume with the flags"):
            load_state(SESSION, lambda accelerator, folder: None, None, str(tmp_path))


def test_a_loss_that_is_not_finite_stops_no_state(begin, tmp_path):
    begin(**FLOW)
    place = {"losses": [0.5, float("inf")]}
    save_state(SESSION, lambda accelerator, folder: None, None, str(tmp_path), place=place)
    assert json.loads((tmp_path / RECORD).read_text())["place"] == place
