"""The kohya adapter and what the base model says: a warning where the flags train otherwise, and the truth in
what is saved."""

import argparse
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling, read_record
from sdxl_fixes.errors import FlagError
from sdxl_fixes.kohya import checkpoint
from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.kohya.flags import OURS
from sdxl_fixes.kohya.run import SESSION
from sdxl_fixes.model_files.header import ROOM_KEY
from sdxl_fixes.model_files.model_file import ModelFile
from sdxl_fixes.model_files.stamp import stamp_file

SDXL = NoiseSchedule.sdxl()


@pytest.fixture
def start(capsys):
    """Start a run as the trainer's arguments do; returns it and what was printed."""

    def run(base, **flags):
        SESSION.begin(kohya_run.start(argparse.Namespace(pretrained_model_name_or_path=str(base), **flags)))
        return SESSION.run, capsys.readouterr().err

    yield run
    SESSION.reset()


V_ZERO = dict(v_parameterization=True, zero_terminal_snr=True)
# what the base says -> the advice that a run without flags gets
ADVICE = {
    "v": (Sampling(SDXL, "v_prediction"), "give --match_base, or --v_parameterization\n"),
    "v ztsnr": (
        Sampling(SDXL.zero_terminal_snr(), "v_prediction"),
        "give --match_base, or --v_parameterization --zero_terminal_snr\n",
    ),
    "eps 300": (
        Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"),
        "give --match_base, or --terminal_sigma 300 --terminal_sigma_method beta_end\n",
    ),
    "v tail": (
        Sampling(SDXL.with_terminal_sigma(100, "tail", 700), "v_prediction"),
        "--terminal_sigma 100 --terminal_sigma_method tail --terminal_sigma_start 700\n",
    ),
    "flow": (
        Sampling(NoiseSchedule.flow(2.5), "flow_prediction"),
        "give --match_base, or --prediction_type flow_prediction --flow_shift 2.5\n",
    ),
    "a flow of its own": (Sampling(SDXL, "flow_prediction"), "give --match_base\n"),
    "cosine": (Sampling(NoiseSchedule.cosine(), "epsilon"), "give --match_base\n"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_a_base_that_says_otherwise_is_warned_about(case, start, tmp_path):
    sampling, advice = ADVICE[case]
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, sampling)
    run, said = start(base)
    assert "WARNING" in said and advice in said and str(sampling) in said
    spec = checkpoint.model_spec(lambda: {"modelspec.title": "x"})
    assert (
        read_record(spec) == Sampling(SDXL, "epsilon") == Sampling(run.schedule, run.prediction_type)
    )  # what was trained
    assert spec["modelspec.prediction_type"] == "epsilon" and spec["modelspec.title"] == "x"


def test_the_advice_is_followed_without_a_warning_and_carries_record_and_markers(start, tmp_path):
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
    _, said = start(base, **V_ZERO)
    assert "WARNING" not in said
    saved, file = {}, tmp_path / "x.y.safetensors"
    checkpoint.save_file(lambda tensors, filename: saved.update(tensors), {"w": 1}, str(file))
    assert set(saved) == {"w", "v_pred", "ztsnr"}
    stock = DDIMScheduler.from_pretrained(tmp_path / "x.y.scheduler_config.json")  # as loading.md says
    assert stock.alphas_cumprod[-1] == 0 and stock.config.prediction_type == "v_prediction"


def test_markers_alone_and_folders_speak_too(start, tmp_path):
    base = write(tmp_path / "m.safetensors", {**KINDS["checkpoint"], "v_pred": [0], "ztsnr": [0]})
    assert (
        "give --match_base, or --v_parameterization --zero_terminal_snr" in start(base)[1]
        and "WARNING" not in start(base, **V_ZERO)[1]
    )
    (tmp_path / "folder" / "scheduler").mkdir(parents=True)
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(SDXL.to_config("v_prediction")))
    assert "give --match_base, or --v_parameterization\n" in start(config.parent.parent)[1]


@pytest.mark.parametrize(
    "base", ["stabilityai/stable-diffusion-xl-base-1.0", "plain", "stock folder", "pickle", "broken"]
)
def test_a_base_that_says_nothing_changes_nothing(base, start, tmp_path, monkeypatch):
    path = tmp_path / ("m.ckpt" if base == "pickle" else "m.safetensors")
    if base == "plain":
        base = model(path)
    elif base == "stock folder":
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SDXL.to_config("epsilon")))
        base = tmp_path
    elif base in ("pickle", "broken"):
        path.write_bytes(b"PK\x03\x04" if base == "pickle" else b"{}")
        base = path
    monkeypatch.setattr(kohya_run, "hub_config", lambda name: SDXL.to_config("epsilon"))
    kohya_run._on_the_hub.cache_clear()
    run, said = start(base)
    assert "WARNING" not in said and not run.on
    assert ("is a pickle, which is never opened here, so it cannot be told" in said) == (
        path.suffix == ".ckpt"
    )
    assert checkpoint.model_spec(lambda: {"a": "b"}) == {"a": "b"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [(dict(terminal_sigma=math.inf), "True"), (dict(terminal_sigma=300.0), "False"), (V_ZERO, "True")],
)
def test_a_network_says_zero_terminal_snr_by_kohyas_word_too(flags, says, start, tmp_path):
    """Upstream's word is its flag, which --terminal_sigma inf leaves off; its save puts the model's words
    after its own."""
    lora = dict(network_module="networks.lora", network_train_unet_only=True, v_parameterization=True)
    run, _ = start(tmp_path / "nowhere", **{**lora, **flags})
    words = {"ss_zero_terminal_snr": str(flags.get("zero_terminal_snr", False)), "ss_output_name": "x"}
    file = write(tmp_path / "lora.safetensors", KINDS["lora"], {**words, **checkpoint.model_spec(dict)})
    found = ModelFile.read(file)
    assert not found.contradictions(Sampling(run.schedule, run.prediction_type))
    assert found.header.metadata["ss_zero_terminal_snr"] == says


def test_saves_leave_room_for_a_later_stamp(start, tmp_path):
    start(tmp_path / "nowhere", v_parameterization=True)
    spec = checkpoint.model_spec(dict)
    assert 16_384 <= len(spec[ROOM_KEY]) <= 65_536 and not spec[ROOM_KEY].strip()


def test_a_base_that_says_v_by_modelspec_alone_and_a_lora_that_is_continued_are_noticed(start, tmp_path):
    spoken = write(tmp_path / "spec.safetensors", KINDS["checkpoint"], {"modelspec.prediction_type": "v"})
    run, said = start(spoken)
    assert "give --match_base, or --v_parameterization\n" in said and "saving" in run.on
    lora = write(tmp_path / "lora.safetensors", KINDS["lora"])
    stamp_file(lora, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
    run, said = start("plain", network_weights=str(lora))
    assert (
        "lora.safetensors says that it is sampled as v_prediction" in said
        and "give --match_base, or --v_parameterization --zero_terminal_snr" in said
    )
    assert "WARNING" not in start("plain", network_weights=str(lora), **V_ZERO)[1]


def test_a_base_whose_record_is_broken_is_named(start, tmp_path):
    base = write(
        tmp_path / "b.safetensors",
        KINDS["checkpoint"],
        {"sdxl_fixes.schedule": '{"format": "sdxl_fixes.schedule"}'},
    )
    assert "b.safetensors" in start(base)[1] and "what it says of its schedule is not known" in start(base)[1]


def test_the_trainers_word_of_modelspec_goes_where_it_would_be_wrong(start, tmp_path):
    """v-prediction on a schedule that "v" does not mean."""
    start(model(tmp_path / "base.safetensors"), v_parameterization=True, terminal_sigma=300.0)
    spec = checkpoint.model_spec(lambda: {"modelspec.prediction_type": "v", "modelspec.title": "kept"})
    assert "modelspec.prediction_type" not in spec and spec["modelspec.title"] == "kept"


def test_a_base_on_the_hub_is_warned_about_too_and_asked_for_once(start, monkeypatch):
    asked = []

    def hub_config(name):
        asked.append(name)
        if name == "someone/gone":
            raise OSError("no connection")
        return SDXL.to_config("v_prediction")

    monkeypatch.setattr(kohya_run, "hub_config", hub_config)
    kohya_run._on_the_hub.cache_clear()
    said = start("someone/model")[1]
    assert "someone/model says that it is sampled as v_prediction" in said and asked == ["someone/model"]
    assert "WARNING" not in start("someone/model", v_parameterization=True)[1]
    assert "WARNING" not in start("someone/gone")[1] and asked.count("someone/gone") == 1


# a base -> the flags that train the same without --match_base
SAME = {
    "v": (Sampling(SDXL, "v_prediction"), dict(v_parameterization=True)),
    "v ztsnr": (Sampling(SDXL.zero_terminal_snr(), "v_prediction"), V_ZERO),
    "eps 300": (
        Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon"),
        dict(terminal_sigma=300.0, terminal_sigma_method="beta_end"),
    ),
    "stock": (Sampling(SDXL, "epsilon"), {}),
}
MORE = dict(loss_type="huber", min_snr_gamma=5.0, ip_noise_gamma=0.1, stable_loss_steps=2)


@pytest.mark.parametrize("case", SAME)
def test_the_base_alone_makes_the_run_that_its_flags_make(case, start, tmp_path):
    sampling, flags = SAME[case]
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, sampling)
    by_flags, _ = start(base, **flags, **MORE)
    by_base, said = start(base, match_base=True, **MORE)
    assert f"  base       {base}: {sampling}, by its record\n" in said and "WARNING: " + str(base) not in said
    assert (by_base.on, by_base.schedule, by_base.prediction_type) == (
        *(by_flags.on, by_flags.schedule, by_flags.prediction_type),
    )
    assert (
        Sampling(by_base.schedule, by_base.prediction_type)
        == sampling
        == read_record(checkpoint.model_spec(dict))
    )
    for run in (by_flags, by_base):  # everything else asks these
        assert run.stable_loss.validation.objective.schedule == run.schedule
    t, x = torch.arange(0, 1000, 37), torch.randn(28, 4, 2, 2)
    noised = [run.noising.get_velocity(x, x.flip(0), t) for run in (by_flags, by_base)]
    assert torch.equal(*noised) and noised[0].shape == x.shape
    both = dict(flags, match_base=True)
    assert start(base, **both, **MORE)[0].schedule == sampling.schedule


def test_kohyas_own_flags_are_set_so_that_its_own_code_follows(tmp_path):
    base = model(tmp_path / "base.safetensors")
    for sampling, v, zero in (
        (Sampling(SDXL.zero_terminal_snr(), "v_prediction"), True, True),
        (Sampling(SDXL.with_terminal_sigma(300), "v_prediction"), True, False),
        (Sampling(NoiseSchedule.cosine(), "epsilon"), False, False),
    ):
        stamp_file(base, sampling, force=True)
        args = argparse.Namespace(
            pretrained_model_name_or_path=str(base),
            **dict(match_base=True, v_parameterization=False, zero_terminal_snr=False),
        )
        run = kohya_run.start(args)
        assert (args.v_parameterization, args.zero_terminal_snr) == (v, zero)
        assert run.schedule == sampling.schedule and "schedule" in run.on
        assert run.args is not args and not hasattr(args, kohya_run.BASE)  # kohya may log all of its own


def test_a_plain_base_trains_as_upstream_does_and_says_on_what_evidence(start, tmp_path):
    base = model(tmp_path / "plain.safetensors")
    run, said = start(base, match_base=True)
    assert not run.on and "no fix is on" in said
    assert f"  base       {base}: epsilon, sigma 0.02917 to 14.6146, by convention, since nothing" in said


def test_contradicting_flags_and_networks_are_refused(start, tmp_path):
    base, lora = model(tmp_path / "base.safetensors"), model(tmp_path / "lora.safetensors", "lora")
    stamp_file(base, Sampling(SDXL.with_terminal_sigma(300), "epsilon"))
    stamp_file(lora, Sampling(SDXL, "v_prediction"))
    for flags, sentence in (
        (dict(v_parameterization=True), "^--v_parameterization contradicts --match_base"),
        (dict(zero_terminal_snr=True), "^--zero_terminal_snr contradicts --match_base"),
        (dict(terminal_sigma=100.0), "^--terminal_sigma 100.0 contradicts --match_base"),
        (dict(network_weights=str(lora)), "--network_weights .*lora.*v_prediction.* do not belong together"),
    ):
        with pytest.raises(FlagError, match=sentence):
            start(base, match_base=True, **flags)
    stamp_file(base, Sampling(NoiseSchedule.linear(num_timesteps=500), "epsilon"), force=True)
    with pytest.raises(FlagError, match="over 500 timesteps, and this trainer has 1000"):
        start(base, match_base=True)


def test_a_switched_off_schedule_takes_match_base_with_it(tmp_path, capsys):
    base = model(tmp_path / "base.safetensors")
    stamp_file(base, Sampling(SDXL.zero_terminal_snr(), "v_prediction"))
    names = dict(pretrained_model_name_or_path=str(base), match_base=True)
    for fixes in ("none", "all,-schedule"):
        args = argparse.Namespace(**names, fixes=fixes)
        run = kohya_run.start(args, OURS)
        assert f"--fixes {fixes}: --match_base has no effect" in capsys.readouterr().err
        assert (
            run.base is None and run.prediction_type == "epsilon" and not hasattr(args, "v_parameterization")
        )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (dict(save_model_as=None), "without --save_model_as a .ckpt is saved, a pickle"),
        (dict(save_model_as="ckpt"), "--save_model_as ckpt saves a pickle"),
        (dict(save_model_as="pt", network_module="x"), "--save_model_as pt saves a pickle"),
    ],
)
def test_a_pickle_that_would_lie_is_refused_and_a_true_one_warned_about(kind, words, start, tmp_path):
    base = model(tmp_path / "base.safetensors")
    if "network_module" in kind:
        kind = {**kind, "network_train_unet_only": True, "cache_text_encoder_outputs": False}
    with pytest.raises(FlagError, match=f"^{words}, which cannot say.*give --save_model_as safetensors"):
        start(base, v_parameterization=True, **kind)
    assert "saving" not in start(base, v_parameterization=True, fixes="all,-saving", **kind)[0].on
    assert "WARNING" not in start(base, **kind)[1]
    stamp_file(base, Sampling(SDXL, "epsilon"))
    said = start(base, **kind)[1]
    assert f"WARNING: {words}, which carries neither record nor markers" in said and "markers v" not in said


def test_what_is_no_pickle_is_not_refused(start, tmp_path):
    base, folder = model(tmp_path / "base.safetensors"), tmp_path / "folder"
    folder.mkdir()
    for kind in (
        dict(save_model_as=None, use_safetensors=True),
        dict(save_model_as="ckpt", use_safetensors=True),  # upstream's own words
        dict(save_model_as="safetensors"),
        dict(save_model_as="diffusers"),
    ):
        assert "saving" in start(base, v_parameterization=True, **kind)[0].on
    assert "saving" in start(folder, v_parameterization=True, save_model_as=None)[0].on
