"""What inspect says of SD.Next, against its own functions: set SDNEXT to a checkout. Of its modules, which
need the whole UI, the two functions that choose the scheduler are taken out and run."""

import ast
import copy
import os
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
from loading import SAMPLINGS, SDXL, stamped_checkpoint, stamped_folder
from test_verdicts import NAMES

from sdxl_fixes.checkpoint import Sampling, samplable
from sdxl_fixes.uis.verdicts import CASES, UIS, verdicts

CHECKOUT = os.environ.get("SDNEXT")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="runs SD.Next's own functions: set SDNEXT=path/to/sdnext"
)


def function(file, name):
    """The function of the checkout, with the logger and the state left out."""
    tree = ast.parse((Path(CHECKOUT) / "modules" / file).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    shown = types.SimpleNamespace(info=print, debug=print, warning=print)
    shared = types.SimpleNamespace(state=types.SimpleNamespace())
    space = {"diffusers": diffusers, "log": shown, "shared": shared, "copy": copy, "CheckpointInfo": object}
    exec(compile(ast.Module([found], []), file, "exec"), space)
    return space[name]


def loaded(path):
    """The scheduler of a single file, which diffusers gave that of SD.Next's copy of SDXL's config."""
    stock = Path(CHECKOUT) / "configs" / "sdxl" / "scheduler"
    pipe = types.SimpleNamespace(scheduler=diffusers.EulerAncestralDiscreteScheduler.from_pretrained(stock))
    info = types.SimpleNamespace(name=path.stem, path=str(path))
    function("sd_models.py", "set_overrides")(pipe, info, "Stable Diffusion XL")
    return pipe.scheduler


def same(scheduler, sampling):
    """Whether it samples that, to float32."""
    if sampling.prediction_type == "flow_prediction":
        config = scheduler.config
        shift = sampling.schedule.made.options["shift"]
        return (config.prediction_type, config.use_flow_sigmas, config.flow_shift) == (
            "flow_prediction",
            True,
            shift,
        )
    table = samplable(sampling.schedule).alphas_cumprod
    close = np.allclose(scheduler.alphas_cumprod.double().numpy(), table, atol=2e-6)
    return scheduler.config.prediction_type == sampling.prediction_type and bool(close)


def row(path):
    return {row.ui: row for row in verdicts(path)[2]}["SD.Next"]


def test_the_row_says_that_this_is_run():
    assert UIS["SD.Next"].ran == UIS["SD.Next"].ran_folder == CASES


@pytest.mark.parametrize("case", SAMPLINGS)
def test_a_checkpoint_is_sampled_as_the_row_says(case, tmp_path):
    path = stamped_checkpoint(tmp_path / "m.safetensors", SAMPLINGS[case])
    scheduler = loaded(path)
    assert same(scheduler, row(path).sampling)
    assert not same(scheduler, Sampling(SDXL.with_terminal_sigma(100), "epsilon"))


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_the_row_says(name, tmp_path):
    path = stamped_checkpoint(tmp_path / f"{name}.safetensors", SAMPLINGS["eps 14.6"])
    assert same(loaded(path), row(path).sampling)


@pytest.mark.parametrize("case", SAMPLINGS)
def test_the_sampler_default_keeps_a_folders_scheduler(case, tmp_path):
    folder = stamped_folder(tmp_path / "folder", SAMPLINGS[case])
    config = diffusers.EulerDiscreteScheduler.load_config(folder / "scheduler")
    own = getattr(diffusers, config["_class_name"]).from_pretrained(folder / "scheduler")
    pipe = types.SimpleNamespace(scheduler=diffusers.DDIMScheduler(), default_scheduler=own)
    made = function("sd_samplers.py", "restore_default")(pipe)
    assert row(folder).right and same(made, SAMPLINGS[case])
