"""What a saved model says about its schedule: the record in its metadata, marker tensors for UIs, a scheduler
config for folders; what is believed before what (files are opened in model_files).

A UI reads little: ComfyUI, Forge, reForge and A1111 know the empty top-level tensors ``v_pred`` and
``ztsnr``, which mean SDXL's own betas; nobody but diffusers can be told another table. A marker that would
make a UI build a wrong table is not written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_fixes.errors import shown
from sdxl_fixes.names import check_prediction_type
from sdxl_fixes.schedule import EXACT_KEY, NoiseSchedule, is_flow

RECORD_KEY = "sdxl_fixes.schedule"
MARKERS = ("v_pred", "ztsnr")
# what modelspec.prediction_type says on SDXL's own betas -> what is predicted, and whether SNR 0 is meant:
# the specification's and kohya's words, and SwarmUI's v-zsnr and x0 (its sd3, flow, tells no shift)
MODELSPEC: dict[str, tuple[str, bool]] = {
    "epsilon": ("epsilon", False),
    "v": ("v_prediction", False),
    "v-zsnr": ("v_prediction", True),
    "x0": ("sample", False),
}
UNET = "model.diffusion_model."
_MODELSPEC, _KOHYA = "modelspec.prediction_type", "ss_zero_terminal_snr"
JSON_LIMIT = 32 << 20  # bytes; a schedule record of a million timesteps, the most there may be, takes 24 MB
_OBJECT = "the object of a scheduler_config.json or a schedule record"
# for samplers that cannot start at infinity; the largest power of 2 whose noise fits float16 (more only where
# the timestep before the last is as noisy already)
STAND_IN_SIGMA = 4096.0
# diffusers' classes that noise and step by timestep, and know no sigma: of all, they can start at SNR 0 (not
# with epsilon)
TIMESTEP_CLASSES = ("DDPMScheduler", "DDIMScheduler")
# diffusers' classes that a saved config may name: of any betas, of rectified flow; the first unless it does
_FOLLOW = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", *TIMESTEP_CLASSES)
_FOLLOW_FLOW = ("UniPCMultistepScheduler",)
# settings by which diffusers' classes sample other noise levels than the betas', or change the predicted
# image -> what they may be
_OVERRULING: dict[str, Any] = {
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal")),
    **{f"use_{kind}": False for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")},
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting", "rescale_betas_zero_snr"), False),
    **dict.fromkeys(("thresholding", "clip_sample"), False),
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "flow_shift": 1.0,
    "lambda_min_clipped": None,  # diffusers' default, minus infinity, is not JSON
}


@dataclass(frozen=True)
class Sampling:
    """How a model must be sampled: the schedule it was trained on, and what it predicts."""

    schedule: NoiseSchedule
    prediction_type: str

    @property
    def zero_terminal(self) -> bool:
        """Whether UIs must be told of zero terminal SNR; flow ends there by itself."""
        return self.schedule.zero_terminal and self.prediction_type != "flow_prediction"

    def __str__(self) -> str:
        said = (
            f"{self.prediction_type}, sigma {self.schedule.sigmas[0]:.4g} to "
            f"{self.schedule.terminal_sigma:.6g}"
        )
        shift = flow_shift(self.schedule)
        return said if shift is None else f"{said}, shift {shift:g}"


def markers(schedule: NoiseSchedule, prediction_type: str) -> tuple[str, ...]:
    """Names of the empty tensors that make UIs load the model right; none where no marker says it."""
    stock = NoiseSchedule.sdxl()
    zero_snr = schedule == stock.zero_terminal_snr()
    if check_prediction_type(prediction_type) not in ("epsilon", "v_prediction") or not (
        zero_snr or schedule == stock
    ):
        return ()
    return (("v_pred",) if prediction_type == "v_prediction" else ()) + (("ztsnr",) if zero_snr else ())


def metadata(schedule: NoiseSchedule, prediction_type: str) -> dict[str, str | None]:
    """Entries of ``__metadata__``; None means that the entry must be absent (SwarmUI would build SDXL's own
    table from it)."""
    stock = NoiseSchedule.sdxl()
    words = (
        word
        for word, (predicts, zero_snr) in MODELSPEC.items()
        if predicts == prediction_type and schedule == (stock.zero_terminal_snr() if zero_snr else stock)
    )
    flow = prediction_type == "flow_prediction" and flow_shift(schedule) is not None
    record = {**schedule.to_record(), "prediction_type": check_prediction_type(prediction_type)}
    return {
        RECORD_KEY: json.dumps(record, allow_nan=False, separators=(",", ":")),
        "modelspec.prediction_type": "sd3" if flow else next(words, None),
    }


def sampling_of_file(metadata: Mapping[str, str], tensors: Collection[str]) -> Sampling | None:
    """What a model file says by its metadata and its tensors' names, as :func:`said_of_file`. None where
    nothing says other than SDXL's own. Raises ValueError for a broken record or a newer version."""
    said = said_of_file(metadata, tensors)
    return None if said is None else said[0]


def said_of_file(metadata: Mapping[str, str], tensors: Collection[str]) -> tuple[Sampling, str] | None:
    """The same, and by what it says it: by its record, else by its markers, else by modelspec's and kohya's
    metadata."""
    if (record := read_record(metadata)) is not None:
        return record, "its record"
    found = [name for name in MARKERS if any(prefix + name in tensors for prefix in ("", UNET))]
    v, zero_snr = (name in found for name in MARKERS)
    if (sampling := _told("v_prediction" if v else "epsilon", zero_snr)) is not None:
        return sampling, f"its {'markers' if found[1:] else 'marker'} {' and '.join(found)}"
    entries = {key: metadata[key] for key in (_MODELSPEC, _KOHYA) if key in metadata}
    if (sampling := _sampling_of_metadata(metadata)) is not None:
        return sampling, f"its metadata {', '.join(f'{key} {value}' for key, value in entries.items())}"
    return None


def read_record(metadata: Mapping[str, str]) -> Sampling | None:
    """What the record in a file's metadata says; None without one. Raises ValueError for a broken record or a
    newer version."""
    text = metadata.get(RECORD_KEY)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its schedule record ({RECORD_KEY}) is not JSON: {error}") from error
    return _sampling_of_record(record)


def _sampling_of_record(record: Any) -> Sampling:
    schedule = NoiseSchedule.from_record(record)
    prediction_type = record.get("prediction_type")
    if not isinstance(prediction_type, str):
        raise ValueError(
            f"the schedule record's prediction_type is {shown(prediction_type)}: expected a "
            "name such as v_prediction"
        )
    return Sampling(schedule, check_prediction_type(prediction_type))


def _sampling_of_metadata(metadata: Mapping[str, str]) -> Sampling | None:
    """Without our record: what is predicted by ``modelspec.prediction_type`` (see MODELSPEC), zero terminal
    SNR by that and kohya's ``ss_zero_terminal_snr``. None where that is SDXL's own epsilon. ``sd3`` says
    flow, but not of which shift, which only a record does; ``ss_v2`` is about Stable Diffusion 2's
    architecture."""
    word = metadata.get(_MODELSPEC, "epsilon")
    if word == "sd3":
        return None
    predicts, zero_snr = MODELSPEC.get(word, ("epsilon", False))
    return _told(predicts, zero_snr or metadata.get(_KOHYA) == "True")


def _told(predicts: str, zero_snr: bool) -> Sampling | None:
    """A prediction on SDXL's own betas, rescaled for zero terminal SNR or not; None where that is SDXL's
    own."""
    stock = NoiseSchedule.sdxl()
    sampling = Sampling(stock.zero_terminal_snr() if zero_snr else stock, predicts)
    return None if sampling == Sampling(stock, "epsilon") else sampling


def sampling_of_json(content: Mapping[str, Any], predicts: str | None = None) -> Sampling:
    """What a scheduler config, a schedule record or the output of ``sdxl-fixes schedule --json`` says.
    ``predicts`` is what is predicted on a schedule whose record does not say it (NoiseSchedule.to_json);
    raises ValueError where nobody does, and for what is none of these or mistakes anything."""
    record = content.get("record", content)
    if not isinstance(record, dict) or "format" not in record:
        return sampling_of_config(content)
    if "prediction_type" in record:
        return _sampling_of_record(record)
    schedule = NoiseSchedule.from_record(record)
    if predicts is None:
        raise ValueError("it tells the schedule; tell also what the model predicts, with --prediction_type")
    return Sampling(schedule, check_prediction_type(predicts))


def sampling_of_config(config: Any) -> Sampling:
    """What a diffusers scheduler config says. Raises ValueError, in one sentence, for one that describes no
    noise schedule or mistakes anything."""
    schedule, flow = NoiseSchedule.from_config(config), is_flow(config)
    # diffusers' default; its flow-matching classes know no other than flow
    default = "flow_prediction" if flow and not config.get("use_flow_sigmas") else "epsilon"
    prediction_type = check_prediction_type(config.get("prediction_type", default))
    if flow and prediction_type != "flow_prediction":
        why = "use_flow_sigmas" if config.get("use_flow_sigmas") else "the shift of a flow-matching class"
        expected = f"expected flow_prediction, got {prediction_type}"
        raise ValueError(f"the scheduler config has {why}, so its prediction_type is wrong: {expected}")
    return Sampling(schedule, prediction_type)


# of diffusers' classes (0.25 to 0.42): what they do where the config does not say it, and what they can
_CLIPPING = {"DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"}
_LEADING = _CLIPPING | {"PNDMScheduler", "LCMScheduler", "TCDScheduler"}
_RESCALING = _CLIPPING | {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"}
_RESCALING |= {"TCDScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
_SIGMA_KEYS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def overruled(config: Mapping[str, Any]) -> list[str]:
    """What a scheduler config says beside its schedule that makes diffusers' class sample something else,
    each as half a sentence. Another spacing of the same schedule (Karras' sigmas alone) is none of it."""
    name, sampling = str(config.get("_class_name")), sampling_of_config(config)
    found = []
    if config.get("timestep_type") == "continuous" and sampling.prediction_type == "v_prediction":
        found.append("timestep_type continuous tells the network 0.25 log sigma in place of the timestep")
    if any(config.get(key) for key in _SIGMA_KEYS):
        ends = {key: config.get(key) for key in ("sigma_min", "sigma_max")}
        found += [f"{key} {shown(end)} ends sampling there" for key, end in ends.items() if end is not None]
    if config.get("clip_sample", name in _CLIPPING):
        found.append("clip_sample clips the image, whose latents are larger")
    if config.get("thresholding"):
        found.append("thresholding clips the image, whose latents are larger")
    spacing = config.get("timestep_spacing", "leading" if name in _LEADING else "linspace")
    if spacing == "leading" and sampling.schedule != NoiseSchedule.sdxl():
        found.append("timestep_spacing leading does not start at the last timestep")
    if config.get("rescale_betas_zero_snr") and name not in _RESCALING:
        found.append(f"{name} knows no rescale_betas_zero_snr")
    if config.get("use_flow_sigmas") and config.get("trained_betas") is not None:
        found.append("use_flow_sigmas sets its trained_betas aside")
    if name.startswith("FlowMatch"):
        found.append(f"diffusers' SDXL pipeline does not run with {name}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, in one sentence, for anything else."""
    with open(file, "rb") as opened:
        text = opened.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{file} has more than {JSON_LIMIT} bytes: expected {_OBJECT}")
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): expected {_OBJECT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected {_OBJECT}")
    return content


def flow_shift(schedule: NoiseSchedule) -> float | None:
    """The shift of a rectified-flow schedule; None for any other."""
    made = schedule.made
    is_flow = made.maker == "flow" and not schedule.changes and schedule == made.again(len(schedule))
    return made.options["shift"] if is_flow else None


def samplable(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule itself or, if it ends at an infinite sigma, with a finite one at its last timestep:
    STAND_IN_SIGMA or, if that is more, 1.1 times the sigma of the timestep before."""
    if not schedule.zero_terminal:
        return schedule
    return schedule.with_terminal_sigma(max(STAND_IN_SIGMA, 1.1 * float(schedule.sigmas[-2])), "last")


def scheduler_config(
    name: str,
    schedule: NoiseSchedule,
    prediction_type: str,
    base: Mapping[str, Any] | None = None,
    settings: Collection[str] | None = None,
) -> dict[str, Any]:
    """The config that diffusers' class ``name`` should get, for its ``from_config`` or as a
    scheduler_config.json: the schedule as far as that class can follow it, trailing spacing, and what
    ``base`` (another config) says besides, but for what would overrule the schedule or change the predicted
    image. Our drop-ins read the exact schedule from it.

    ``settings`` are those that the class has; None means a recent diffusers'. One that it does not have it
    would ignore, and a class that cannot step from an infinite sigma is told a finite stand-in, and the
    drop-ins what that stands for.
    """
    kept = {key: value for key, value in (base or {}).items() if _may_stay(key, value)}
    kept |= {"_class_name": name, "clip_sample": False}  # some classes clip if it is not said
    stock, shift = NoiseSchedule.sdxl(), flow_shift(schedule)
    knows_rescale = settings is None or "rescale_betas_zero_snr" in settings
    knows_flow = name in _FOLLOW_FLOW if settings is None else "use_flow_sigmas" in settings
    infinite = schedule.zero_terminal and name not in TIMESTEP_CLASSES
    # named: stock classes and other readers know what the flag means
    if knows_rescale and schedule == stock.zero_terminal_snr():
        return kept | stock.to_config(prediction_type) | {"rescale_betas_zero_snr": True}
    told = (samplable(schedule) if infinite else schedule).to_config(prediction_type)
    if knows_flow and shift is not None and prediction_type == "flow_prediction":
        told |= {"use_flow_sigmas": True, "flow_shift": shift, "trained_betas": None}
    if not knows_rescale:
        del told["rescale_betas_zero_snr"]
    return kept | told | ({EXACT_KEY: {"zero_terminal_snr": True}} if infinite else {})


def _may_stay(key: str, value: Any) -> bool:
    if key in _OVERRULING:
        return bool(value == _OVERRULING[key])
    return key not in ("_use_default_values", EXACT_KEY)


def stock_config(sampling: Sampling, base: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The scheduler_config.json by which stock diffusers samples that: :func:`scheduler_config` of ``base``'s
    own class if that can, else of one that can. None where none can."""
    flow = sampling.prediction_type == "flow_prediction"
    if flow and flow_shift(sampling.schedule) is None:
        return None
    follow, had = _FOLLOW_FLOW if flow else _FOLLOW, (base or {}).get("_class_name")
    name = next((name for name in follow if name == had), follow[0])
    return scheduler_config(name, sampling.schedule, sampling.prediction_type, base)
