"""What sd-scripts' own merging tools leave of a stamped LoRA: set SD_SCRIPTS to a checkout (and its
requirements are needed)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loading import SAMPLINGS

from sdxl_fixes.cli import main
from sdxl_fixes.model_files.header import read_header
from sdxl_fixes.model_files.model_file import ModelFile

CHECKOUT = os.environ.get("SD_SCRIPTS")
pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="runs sd-scripts' tools: set SD_SCRIPTS=path/to/sd-scripts"
)
MODULE = "lora_unet_input_blocks_8_1_transformer_blocks_5_attn1_to_k"


def test_a_merge_loses_the_record_and_inspect_notices(tmp_path, capsys):
    pytest.importorskip("cv2", reason="sd-scripts' requirements are not here")
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    state = {f"{MODULE}.lora_down.weight": torch.ones(4, 1280), f"{MODULE}.alpha": torch.tensor(4.0)}
    state[f"{MODULE}.lora_up.weight"] = torch.ones(1280, 4)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        safetensors.save_file(state, path)
        assert main(["stamp", str(path), "--prediction_type", "v-zsnr"]) == 0
    merged = tmp_path / "merged.safetensors"
    tool = Path(CHECKOUT) / "networks" / "sdxl_merge_lora.py"
    words = [sys.executable, tool, "--save_to", merged, "--models", *paths, "--ratios", "0.5", "0.5"]
    env = {**os.environ, "PYTHONPATH": CHECKOUT}
    done = subprocess.run(words, cwd=CHECKOUT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_header(merged).metadata["modelspec.prediction_type"] == "epsilon"
    assert ModelFile.read(merged).sampling is None
    capsys.readouterr()
    assert main(["inspect", str(merged)]) == 0
    text = capsys.readouterr().out
    assert "That may be lost: it is a merge (modelspec.merged_from: a, b)" in text
    assert f"sdxl-fixes stamp {merged} --force with" in text
    assert main(["stamp", str(merged), "--from", str(paths[0]), "--force"]) == 0
    assert ModelFile.read(merged).record == SAMPLINGS["v + ZTSNR"]
