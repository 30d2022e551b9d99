"""What a saved model says about its schedule: the record in its metadata, marker tensors for UIs, a scheduler
config for folders.

A UI reads little: ComfyUI, Forge, reForge and A1111 know the empty top-level tensors ``v_pred`` and
``ztsnr``, which mean SDXL's own betas; nobody but diffusers can be told another table. A marker that would
make a UI build a wrong table is not written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_fixes.errors import shown
from sdxl_fixes.names import check_prediction_type
from sdxl_fixes.schedule import EXACT_KEY, NoiseSchedule

RECORD_KEY = "sdxl_fixes.schedule"
_OBJECT = "the object of a scheduler_config.json or a schedule record"
# for samplers that cannot start at infinity; the largest power of 2 whose noise fits float16
STAND_IN_SIGMA = 4096.0


@dataclass(frozen=True)
class Sampling:
    """How a model must be sampled: the schedule it was trained on, and what it predicts."""

    schedule: NoiseSchedule
    prediction_type: str

    def __str__(self) -> str:
        return (
            f"{self.prediction_type}, sigma {self.schedule.sigmas[0]:.4g} to "
            f"{self.schedule.terminal_sigma:.6g}"
        )


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
    known = {("epsilon",): "epsilon", ("v_pred",): "v", ("v_pred", "ztsnr"): "v-zsnr"}
    stock_epsilon = ("epsilon",) if prediction_type == "epsilon" and schedule == NoiseSchedule.sdxl() else ()
    flow = prediction_type == "flow_prediction" and flow_shift(schedule) is not None
    record = {**schedule.to_record(), "prediction_type": check_prediction_type(prediction_type)}
    return {
        RECORD_KEY: json.dumps(record, allow_nan=False, separators=(",", ":")),
        "modelspec.prediction_type": "sd3"
        if flow
        else known.get(stock_epsilon or markers(schedule, prediction_type)),
    }


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
    return sampling_of_record(record)


def sampling_of_record(record: Any) -> Sampling:
    """The same for a parsed record. Raises ValueError if it lacks or mistakes anything."""
    schedule = NoiseSchedule.from_record(record)
    prediction_type = record.get("prediction_type")
    if not isinstance(prediction_type, str):
        raise ValueError(
            f"the schedule record's prediction_type is {shown(prediction_type)}: expected a "
            "name such as v_prediction"
        )
    return Sampling(schedule, check_prediction_type(prediction_type))


def sampling_of_config(config: Any) -> Sampling:
    """What a diffusers scheduler config says. Raises ValueError, in one sentence, for one that describes no
    noise schedule or mistakes anything."""
    schedule = NoiseSchedule.from_config(config)
    prediction_type = check_prediction_type(config.get("prediction_type", "epsilon"))  # diffusers' default
    if config.get("use_flow_sigmas") and prediction_type != "flow_prediction":
        expected = f"expected flow_prediction, got {prediction_type}"
        raise ValueError(
            f"the scheduler config has use_flow_sigmas, so its prediction_type is wrong: {expected}"
        )
    return Sampling(schedule, prediction_type)


def sampling_of_metadata(metadata: Mapping[str, str]) -> Sampling | None:
    """What a file's metadata says without our record: v-prediction by ``modelspec.prediction_type`` (``v``,
    kohya's; ``v-zsnr``, SwarmUI's, also of zero terminal SNR), zero terminal SNR by kohya's
    ``ss_zero_terminal_snr``. None where that is SDXL's own epsilon. ``sd3`` says flow, but not of which
    shift, which only a record does; ``ss_v2`` is about Stable Diffusion 2's architecture."""
    predicts = metadata.get("modelspec.prediction_type")
    zero_snr = predicts == "v-zsnr" or metadata.get("ss_zero_terminal_snr") == "True"
    if predicts == "sd3":
        return None
    return marked_sampling(predicts in ("v", "v-zsnr"), zero_snr)


def marked_sampling(v: bool, zero_snr: bool) -> Sampling | None:
    """SDXL's own betas with v-prediction, zero terminal SNR, or both; None with neither."""
    stock = NoiseSchedule.sdxl()
    sampling = Sampling(stock.zero_terminal_snr() if zero_snr else stock, "v_prediction" if v else "epsilon")
    return sampling if v or zero_snr else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, in one sentence, for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): expected {_OBJECT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected {_OBJECT}")
    return content


def read_sampling(file: Path) -> tuple[Sampling, bool]:
    """What a scheduler_config.json, a schedule record or the output of ``sdxl-fixes schedule --json`` says,
    and whether it says what is predicted (if not, epsilon stands there). Raises ValueError, naming the file,
    if it is none of these or mistakes anything."""
    content = read_json(file)
    record = content.get("record", content)
    try:
        if not isinstance(record, dict) or "format" not in record:
            return sampling_of_config(content), "prediction_type" in content
        return sampling_of_record({"prediction_type": "epsilon", **record}), "prediction_type" in record
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def flow_shift(schedule: NoiseSchedule) -> float | None:
    """The shift of a rectified-flow schedule; None for any other."""
    step = schedule.recipe[0]
    made = step.get("make") == "flow" and schedule == NoiseSchedule.flow(step["shift"], len(schedule))
    return float(step["shift"]) if made and len(schedule.recipe) == 1 else None


def samplable(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule itself or, if it ends at an infinite sigma, with STAND_IN_SIGMA at its last timestep."""
    return schedule.with_terminal_sigma(STAND_IN_SIGMA, "last") if schedule.residual_signal == 0 else schedule


def scheduler_config(
    schedule: NoiseSchedule,
    prediction_type: str,
    base: Mapping[str, Any] | None = None,
    knows_rescale: bool = True,
    knows_infinity: bool = False,
) -> dict[str, Any]:
    """A config for ``SomeScheduler.from_config`` or a scheduler_config.json: ``base`` with the schedule in
    place of its own, as far as a stock diffusers class can follow it; our drop-ins read the exact schedule
    from it.

    ``knows_rescale``: the class has rescale_betas_zero_snr (one that has not would ignore it);
    ``knows_infinity``: it can step from an infinite sigma. Others are told a finite stand-in, and the
    drop-ins what it stands for.
    """
    stock = NoiseSchedule.sdxl()
    kept = {
        key: value for key, value in (base or {}).items() if key not in ("_use_default_values", EXACT_KEY)
    }
    # named: stock classes and other readers know what the flag means
    if knows_rescale and schedule == stock.zero_terminal_snr():
        return kept | stock.to_config(prediction_type) | {"rescale_betas_zero_snr": True}
    config = kept | (schedule if knows_infinity else samplable(schedule)).to_config(prediction_type)
    if not knows_rescale:
        del config["rescale_betas_zero_snr"]
    if schedule.residual_signal == 0 and not knows_infinity:
        config[EXACT_KEY] = {"zero_terminal_snr": True}
    return config
