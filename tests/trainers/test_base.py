"""--match_base: what a base model says of itself, by what it is believed, and which flags contradict it."""

import json

import pytest
from models import KINDS, model, write

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.trainers import base as bases
from sdxl_fixes.trainers.base import STOCK, Base, check_flags, check_others, read_base, read_teacher

SDXL = NoiseSchedule.sdxl()
V_ZERO = Sampling(SDXL.zero_terminal_snr(), "v_prediction")
E_300 = Sampling(SDXL.with_terminal_sigma(300, "beta_end"), "epsilon")
SAYS = "modelspec.prediction_type"
BOTH = ("epsilon", "v_prediction")


def stamped(path, sampling, kind="checkpoint"):
    stamp_file(model(path, kind), sampling)
    return path


def config_beside(path, config):
    file = path.with_name(path.stem + ".scheduler_config.json")
    file.write_text(config if isinstance(config, str) else json.dumps(config))


def marked(*names):
    return {**KINDS["checkpoint"], **{name: [0] for name in names}}


V_CONFIG = SDXL.to_config("v_prediction")
# markers, metadata, the config beside it -> how it is sampled, and by what that is said
FILES = {
    "markers": (("v_pred", "ztsnr"), {SAYS: "epsilon"}, None, V_ZERO, "its markers v_pred and ztsnr"),
    "modelspec": (
        (),
        {SAYS: "v"},
        SDXL.to_config(),
        Sampling(SDXL, "v_prediction"),
        f"its metadata {SAYS} v",
    ),
    "config": (
        (),
        {SAYS: "epsilon"},
        V_CONFIG,
        Sampling(SDXL, "v_prediction"),
        "scheduler_config.json beside it",
    ),
    "epsilon": ((), {SAYS: "epsilon"}, None, STOCK, f"its metadata {SAYS} epsilon"),
    "nothing": ((), None, None, STOCK, "convention, since nothing in it says otherwise"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_believed_in_this_order(case, tmp_path):
    markers, metadata, config, sampling, by = FILES[case]
    path = write(tmp_path / "m.safetensors", marked(*markers), metadata)
    if config is not None:
        config_beside(path, config)
    base = read_base(str(path))
    assert base.sampling == sampling and base.by.endswith(by) and str(path) in str(base)


def test_a_record_is_believed_before_everything(tmp_path):
    path = write(tmp_path / "m.safetensors", KINDS["checkpoint"], {SAYS: "v-zsnr"})
    stamp_file(path, E_300, force=True)
    config_beside(path, V_CONFIG)
    assert read_base(str(path)) == Base(str(path), E_300, "its record")


def test_a_folder_is_believed_by_its_u_net_then_by_its_scheduler(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(V_CONFIG))
    first = model(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", "diffusers_unet")
    assert read_base(str(tmp_path)).by == "its scheduler config" and first.exists()
    assert read_base(str(tmp_path)).sampling == Sampling(SDXL, "v_prediction")
    stamped(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", E_300, "diffusers_unet")
    assert read_base(str(tmp_path)) == Base(str(tmp_path), E_300, "its record")
    assert read_teacher(str(tmp_path)) == E_300 and read_teacher(None) == STOCK


def test_a_name_on_the_hub_is_believed_by_its_scheduler(monkeypatch):
    from diffusers import DDPMScheduler

    asked = []

    def load_config(name, subfolder, revision):
        asked.append((name, subfolder, revision))
        return V_CONFIG

    monkeypatch.setattr(DDPMScheduler, "load_config", load_config)
    base = read_base("someone/model", "main")
    assert base.sampling == Sampling(SDXL, "v_prediction") and "Hugging Face Hub" in base.by
    assert asked == [("someone/model", "scheduler", "main")]


# what the file is -> the sentence
UNKNOWN = {
    "edm": (marked("edm_vpred.sigma_max"), None, "is an EDM model by its marker edm_vpred.sigma_max"),
    "flow": (marked(), {SAYS: "sd3"}, "says flow .*, but not of which shift"),
    "merged": (marked(), {SAYS: "epsilon", "modelspec.merged_from": "a, b"}, "was merged, .* stamp it"),
    "broken": (marked(), {"sdxl_fixes.schedule": "{"}, r"its schedule record .* is not JSON"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_told_is_one_sentence_that_says_what_to_do(case, tmp_path):
    shapes, metadata, sentence = UNKNOWN[case]
    path = write(tmp_path / "m.safetensors", shapes, metadata)
    with pytest.raises(
        FlagError, match=rf"^--match_base: .*m\.safetensors.*{sentence}.*leave --match_base out"
    ) as e:
        read_base(str(path))
    assert "\n" not in str(e.value)
    with pytest.raises(FlagError, match=rf"^--keep_base must know how .*{sentence}.*leave --keep_base out"):
        read_teacher(str(path))


@pytest.mark.parametrize("name", ["noobXL-VPred-1.0", "model_v_pred", "x v-pred"])
def test_a_name_that_speaks_where_the_file_does_not_is_no_convention(name, tmp_path):
    path = model(tmp_path / f"{name}.safetensors")
    with pytest.raises(FlagError, match="is named as if it were of v-prediction, and says nothing: stamp it"):
        read_base(str(path))
    with pytest.raises(FlagError, match=r"^--keep_base must know .* is named as if it were of v-prediction"):
        read_teacher(str(path))
    stamp_file(path, STOCK)
    assert read_base(str(path)).sampling == read_teacher(str(path)) == STOCK
    assert read_base(str(model(tmp_path / "vividpredator.safetensors"))).sampling == STOCK


def test_a_pickle_is_never_opened_and_known_by_the_config_beside_it_alone(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FlagError, match=r"m\.ckpt is a pickle, which is never opened here: convert it"):
        read_base(str(path))
    config_beside(path, V_CONFIG)
    base = read_base(str(path))
    assert base.sampling == Sampling(SDXL, "v_prediction") and base.by == "m.scheduler_config.json beside it"
    config_beside(path, "{")
    with pytest.raises(FlagError, match=r"m\.scheduler_config\.json is not JSON"):
        read_base(str(path))


def test_what_is_nowhere_is_named_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere/model.safetensors", str(tmp_path / "nowhere"), "nowhere"):
        with pytest.raises(FlagError, match=rf"{name} is no folder and no name on the Hugging Face Hub"):
            read_base(name)
    with pytest.raises(FlagError, match="--match_base needs --pretrained_model_name_or_path"):
        read_base(None)


# flags -> whether they agree with a base at zero terminal SNR, at sigma 300 (by beta_end), and SDXL's own
AGREE = {
    (): (True, True, True),
    ("zero_terminal_snr",): (True, False, False),
    (("terminal_sigma", float("inf")),): (True, False, False),
    (("terminal_sigma", 300.0),): (False, True, False),
    (("terminal_sigma", 300.0), ("terminal_sigma_method", "beta_end")): (False, True, False),
    (("terminal_sigma", 300.0), ("terminal_sigma_method", "rescale")): (False, False, False),
}


@pytest.mark.parametrize("words", AGREE)
def test_flags_of_the_schedule_are_fine_where_they_say_the_same_and_else_refused(words):
    given = dict((word, True) if isinstance(word, str) else word for word in words)
    flags = TrainingFlags(match_base=True, **given)
    samplings = (Sampling(V_ZERO.schedule, "epsilon"), E_300, STOCK)
    for sampling, agrees in zip(samplings, AGREE[words], strict=True):
        base = Base("m.safetensors", sampling, "its record")
        if agrees:
            check_flags(base, flags, None, BOTH)
            continue
        with pytest.raises(FlagError) as error:
            check_flags(base, flags, None, BOTH)
        said = str(error.value)
        assert said.startswith(f"--{next(iter(given))}") and said.endswith("leave one of the two out")
        assert f"contradicts --match_base (m.safetensors: {sampling}, by its record)" in said


def test_a_prediction_type_that_is_another_is_refused_and_the_same_is_fine():
    base, flags = Base("m", V_ZERO, "its record"), TrainingFlags(match_base=True)
    check_flags(base, flags, ("--prediction_type v_prediction", "v_prediction"), BOTH)
    with pytest.raises(FlagError, match=r"^--prediction_type epsilon contradicts --match_base \(m: v_pred"):
        check_flags(base, flags, ("--prediction_type epsilon", "epsilon"), BOTH)


def test_what_the_trainer_does_not_train_is_refused():
    flow = Base("m", Sampling(NoiseSchedule.flow(2.5), "flow_prediction"), "its record")
    with pytest.raises(FlagError, match=r"m: flow_prediction.*trains epsilon or v_prediction: take another"):
        check_flags(flow, TrainingFlags(match_base=True), None, BOTH)


def test_a_network_that_is_continued_must_say_the_same(tmp_path):
    base = Base("m", V_ZERO, "its record")
    lora = model(tmp_path / "lora.safetensors", "lora")
    pickle = tmp_path / "lora.pt"
    pickle.write_bytes(b"\x80")
    check_others(base, {"network_weights": str(lora), "weights": str(pickle), "none": None, "no": "nowhere"})
    stamp_file(lora, V_ZERO)
    check_others(base, {"network_weights": str(lora)})
    stamp_file(lora, E_300, force=True)
    with pytest.raises(
        FlagError, match=r"--network_weights .*lora\.safetensors: epsilon.*by its record, and the"
    ):
        check_others(base, {"network_weights": str(lora)})


def test_without_a_base_the_flag_is_refused():
    with pytest.raises(FlagError, match="--match_base needs a base model, and there is none here"):
        TrainingFlags(match_base=True).objective()
    assert TrainingFlags(match_base=True).schedule(E_300.schedule) == E_300.schedule


def test_the_hub_is_not_asked_for_what_is_a_folder(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(V_CONFIG))
    assert bases.hub_config(str(tmp_path))["prediction_type"] == "v_prediction"
