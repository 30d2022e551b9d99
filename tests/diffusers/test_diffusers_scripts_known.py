"""Which scripts are tried, which are refused, and that launcher, doctor and install() say the same. No
checkout is needed."""

import argparse
import sys

import diffusers
import pytest

from sdxl_fixes.cli import main as cli
from sdxl_fixes.diffusers import install, uninstall
from sdxl_fixes.diffusers.__main__ import main as launch
from sdxl_fixes.diffusers.anchors import in_sigma_space, is_sdxl_script, missing, refused
from sdxl_fixes.diffusers.run import caches_may_lie
from sdxl_fixes.diffusers.scripts import TESTED, version
from sdxl_fixes.errors import FlagError

SCRIPT = """
import argparse, sys
def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_{}")
    return parser.parse_args()
def main():
    parse_args()
    sys.exit("started")
    UNet2DConditionModel.from_pretrained(), CLIPTokenizer.from_pretrained(subfolder="tokenizer_2")
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("teacher_model", "it distils a teacher on the teacher's schedule"),
        ("model_name_or_path", None),
        ('model_name_or_path")\n    parser.add_argument("--loss_type', "it has a --loss_type of its own"),
    ],
)
def test_a_refused_script_is_refused_by_all(tmp_path, monkeypatch, capsys, words, why):
    script = tmp_path / "train_x.py"
    script.write_text(SCRIPT.replace("{}", words))
    monkeypatch.setattr(sys, "argv", ["sdxl_fixes.diffusers", str(script)])
    with pytest.raises(SystemExit, match=f"cannot be fixed: {why}" if why else "started"):
        launch()
    uninstall()
    assert cli(["doctor", str(script)]) == (1 if why else 0)
    said = capsys.readouterr().out.splitlines()[0]
    assert f": refused, {why}" in said if why else "not tested" in said
    install()
    monkeypatch.setattr(sys, "argv", [str(script)])
    names = {"__name__": "__main__", "__file__": str(script)}
    with pytest.raises(
        FlagError if why else SystemExit, match=f"cannot be fixed: {why}" if why else "started"
    ):
        exec(compile(script.read_text(), str(script), "exec"), names)
    uninstall()


def test_a_script_is_known_by_its_parts():
    source = SCRIPT.replace("{}", "model_name_or_path")
    assert is_sdxl_script(source) and not is_sdxl_script(source.replace("tokenizer_2", "tokenizer"))
    assert not is_sdxl_script(source.replace("UNet2DConditionModel", "FluxTransformer2DModel"))
    assert is_sdxl_script(
        source.replace("UNet2DConditionModel", "StableDiffusionXLPipeline").replace(
            "tokenizer_2", "tokenizer"
        )
    )
    euler = source.replace("UNet2DConditionModel", "EulerDiscreteScheduler")
    assert (
        in_sigma_space(euler)
        and not in_sigma_space(euler + "\nDDPMScheduler.from_pretrained()")
        and not in_sigma_space("")
    )


def test_what_stands_beside_the_loss_takes_the_place_of_fixes():
    source = SCRIPT.replace("{}", "model_name_or_path")
    everything = (
        source + "\nDDPMScheduler.from_pretrained(), noise_scheduler.add_noise(), F.mse_loss(), "
        'torch.randint(), "--caption_column"'
    )
    assert not {"loss", "weighting", "noise", "timesteps", "buckets"} & set(missing(everything))
    perceptual = missing(everything + "\nLatentPerceptualLoss()")
    assert {perceptual[fix] for fix in ("loss", "weighting", "noise", "timesteps")} == {
        "it adds a perceptual loss of its own, which no fix knows"
    }
    assert "class and instance" in missing(everything + '\n"--instance_prompt"')["buckets"]
    assert refused(everything) is None and not missing("")


def test_the_version_is_that_of_the_script_and_of_diffusers(monkeypatch):
    for name, releases in TESTED.items():
        for here in ("0.32.1", "0.42.1", "9.9"):
            monkeypatch.setattr(diffusers, "__version__", here)
            assert version(f"anywhere/{name}").startswith("tested with diffusers ")
            assert version(name).endswith(f", here is {here}") == (here not in releases)


def test_checked_caches_of_a_script_that_keeps_none_are_asked_for():
    args = argparse.Namespace(checked_caches=True, max_token_length=None, true_crop_coordinates=False)
    assert caches_may_lie(args)  # so that it is refused, not ignored
    assert not caches_may_lie(argparse.Namespace(**{**vars(args), "cache_latents": False}))
