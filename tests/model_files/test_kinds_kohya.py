"""What a file is, by sd-scripts' own classes, whose names UIs share: set SD_SCRIPTS to a checkout (and its
requirements are needed). Full size, on torch's meta device."""

import importlib
import os
import sys

import pytest
import torch
from models import write

from sdxl_fixes.model_files.kinds import Contents
from sdxl_fixes.model_files.model_file import ModelFile

CHECKOUT = os.environ.get("SD_SCRIPTS")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="asks sd-scripts' classes: set SD_SCRIPTS=path/to/sd-scripts"
)


@pytest.fixture(scope="module", autouse=True)
def checkout():
    pytest.importorskip("cv2", reason="sd-scripts' requirements are not here")
    sys.path.insert(0, CHECKOUT)
    yield
    sys.path.remove(CHECKOUT)


@pytest.fixture(scope="module")
def unet(checkout):
    with torch.device("meta"):
        return importlib.import_module("library.sdxl_original_unet").SdxlUNet2DConditionModel()


def shapes(state, prefix=""):
    return {prefix + name: list(tensor.shape) for name, tensor in state.items()}


def test_the_unet_with_and_without_its_prefix(unet, tmp_path):
    for prefix, kind in (("", "bare_unet"), ("model.diffusion_model.", "unet")):
        path = write(tmp_path / "m.safetensors", shapes(unet.state_dict(), prefix))
        assert ModelFile.read(path).contents == Contents(kind, "SDXL", True)


def test_the_control_net_is_no_unet(tmp_path):
    control = importlib.import_module("library.sdxl_original_control_net")
    with torch.device("meta"):
        state = control.SdxlControlNet().state_dict()
    path = write(tmp_path / "c.safetensors", shapes(state))
    with pytest.raises(ValueError, match="a ControlNet, which"):
        ModelFile.read(path)


@pytest.mark.parametrize("module", ["lora", "lora_fa", "dylora", "oft", "loha", "lokr"])
def test_its_networks_are_networks_of_sdxl(module, unet, tmp_path):
    try:
        found = importlib.import_module(f"networks.{module}")
    except ModuleNotFoundError:
        pytest.skip(f"this sd-scripts has no networks.{module}")
    with torch.device("meta"):
        network = found.create_network(1.0, 4, 1.0, None, [], unet)
        network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    path = write(tmp_path / "l.safetensors", shapes(network.state_dict()))
    assert ModelFile.read(path).contents == Contents("lora", "SDXL", True)


def test_lllite_is_no_unet_and_no_lora(unet, tmp_path):
    with torch.device("meta"):
        made = importlib.import_module("networks.control_net_lllite").ControlNetLLLite(unet, 16, 8)
        made.apply_to()
    path = write(tmp_path / "l.safetensors", shapes(made.state_dict()))
    with pytest.raises(ValueError, match="a ControlNet-LLLite, which"):
        ModelFile.read(path)
