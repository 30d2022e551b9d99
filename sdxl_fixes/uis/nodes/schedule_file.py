"""Read the schedule record of a .safetensors file, and check that a UI's sampling object follows it. Copied
into UIs by ``sdxl-fixes comfyui install`` and ``sdxl-fixes webui install``.

It runs in the UI's own Python, where sdxl-fixes is not installed, so it needs numpy only (and torch, which
every UI has, to check). It is therefore the one other place that turns betas into sigmas; a test holds it
equal to sdxl_fixes.NoiseSchedule, bit for bit. It reads 8 bytes and the JSON after them, nothing else.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RECORD_KEY, VERSION = "sdxl_fixes.schedule", 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
LIMIT = 100_000_000  # bytes of header, safetensors' own limit
RECORD_LIMIT = 4_000_000  # characters of record; 1000 timesteps take 22,000
SHOWN = 200  # characters of a file's text that may get into a console
ZERO_SNR_SIGMA = 4518.7636987  # where these UIs end zero terminal SNR, whose last sigma is infinite
MARKERS = ("v_pred", "ztsnr")


class RecordError(ValueError):
    """A record that cannot be followed; the message is one short sentence that any console can show."""


@dataclass(frozen=True)
class Schedule:
    """How to sample the model: sigmas by timestep (float64, rising; 0 to 1 for flow), and what is needed to
    save it again."""

    prediction_type: str
    sigmas: npt.NDArray[np.float64]
    shift: float  # of rectified flow; 1 for everything else
    zero_snr: bool
    record: str
    markers: tuple[str, ...]
    modelspec: str | None

    @property
    def flow(self) -> bool:
        """Whether x = (1 - sigma) image + sigma noise, and the network is told 1000 sigma."""
        return self.prediction_type == "flow_prediction"

    def __str__(self) -> str:
        shift = f", shift {self.shift:g}" if self.flow else ""
        return f"{self.prediction_type}, sigma {self.sigmas[0]:.4g} to {self.sigmas[-1]:.6g}{shift}"


def read_schedule(path: str) -> Schedule | None:
    """The schedule of a file; None if it has no record. Raises RecordError if it has a broken one."""
    header = read_header(path)
    metadata = header.get("__metadata__") if header else None
    if header is None or not isinstance(metadata, dict) or RECORD_KEY not in metadata:
        return None
    prefixes = ("", "model.diffusion_model.")
    markers = tuple(name for name in MARKERS if any(prefix + name in header for prefix in prefixes))
    modelspec = metadata.get("modelspec.prediction_type")
    if not isinstance(modelspec, str) or not modelspec.isprintable():
        modelspec = None
    return parse_record(metadata[RECORD_KEY], markers, modelspec)


def read_header(path: str) -> dict[str, Any] | None:
    """The JSON at the start of a safetensors file; None for anything else, and for a file that does not so
    much as name a record."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = file.read(size) if size <= LIMIT else b""
        return _json_object(content) if RECORD_KEY.encode() in content else None
    except (OSError, ValueError):
        return None


def parse_record(text: Any, markers: tuple[str, ...] = (), modelspec: str | None = None) -> Schedule:
    """The schedule that a record describes. Raises RecordError for anything else."""
    if not isinstance(text, str) or len(text) > RECORD_LIMIT or not text.isascii():
        raise RecordError(f"it is not ASCII text of at most {RECORD_LIMIT} characters")
    record = _json_object(text)
    if record.get("format") != RECORD_KEY or record.get("version") != VERSION:
        version, name = _shown(record.get("version")), _shown(record.get("format"))
        raise RecordError(f"version {version} of {name} is not known here: update sdxl-fixes")
    prediction_type = record.get("prediction_type")
    if prediction_type not in PREDICTION_TYPES:
        raise RecordError(f"unknown prediction_type {_shown(prediction_type)}")
    betas = _betas(record.get("betas"))
    with np.errstate(all="ignore"):  # what overflows is refused below
        sigmas, zero_snr, shift = _sigmas(betas, prediction_type)
        held = sigmas.astype(np.float32)  # as UIs hold it
        rises = bool(held[0] > 0 and np.isfinite(held[-1]) and (np.diff(held) > 0).all())
    if not rises:
        raise RecordError("its noise level does not rise at every timestep, or leaves float32's range")
    return Schedule(prediction_type, sigmas, shift, zero_snr, text, markers, modelspec)


def _sigmas(
    betas: npt.NDArray[np.float64], prediction_type: str
) -> tuple[npt.NDArray[np.float64], bool, float]:
    """The table as UIs sample it, whether it ends at SNR 0, and flow's shift."""
    sigmas = betas_to_sigmas(betas)
    zero_snr = bool(np.isinf(sigmas[-1]))
    if prediction_type == "flow_prediction":
        sigmas[:-1] = sigmas[:-1] / (1 + sigmas[:-1])
        sigmas[-1] = 1.0 if zero_snr else sigmas[-1] / (1 + sigmas[-1])
        return sigmas, zero_snr, flow_shift(sigmas)
    if zero_snr:
        sigmas[-1] = max(ZERO_SNR_SIGMA, 2 * sigmas[-2])
    return sigmas, zero_snr, 1.0


def betas_to_sigmas(betas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sqrt((1 - alphas_cumprod)/alphas_cumprod), infinite where nothing of the image is left."""
    alphas_cumprod = np.cumprod(1 - betas)
    with np.errstate(divide="ignore", over="ignore"):
        sigmas: npt.NDArray[np.float64] = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return sigmas


def flow_shift(sigmas: npt.NDArray[np.float64]) -> float:
    """The s of a table s u/(1 + (s - 1) u), u = 1/T ... 1 (arXiv:2403.03206, eq. 23), to 9 digits; 1 for any
    other table, whose steps are taken from it as it stands."""
    u = np.arange(1, len(sigmas)) / len(sigmas)
    shifts = sigmas[:-1] / (1 - sigmas[:-1]) * (1 - u) / u
    return float(f"{shifts[0]:.9g}") if np.allclose(shifts, shifts[0], rtol=1e-6) else 1.0


def check(sampling: Any, schedule: Schedule) -> None:
    """Whether a UI's object (ComfyUI's model_sampling, Forge's predictor) samples by the schedule: its table,
    the timesteps that the network is told, its input, the image made of its output, and how noise is added,
    each against its closed form. Raises RecordError, or whatever the object raises, if not."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise, image, output = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(3))
    table = torch.from_numpy(schedule.sigmas)
    _same("table of noise levels", sampling.sigmas, table)
    for t in (0, len(table) // 2, len(table) - 1):
        sigma, s = sampling.sigmas[t : t + 1], float(sampling.sigmas[t])
        norm = (1 + s * s) ** 0.5
        x = (1 - s) * image + s * noise if schedule.flow else image + s * noise
        denoised = {
            "epsilon": x - s * output,
            "flow_prediction": x - s * output,
            "v_prediction": x / norm**2 - output * s / norm,
            "sample": output,
        }[schedule.prediction_type]
        told = torch.tensor([1000 * s if schedule.flow else t])
        of_x, rounding = (x if schedule.flow else x / norm), 1e-5 * (1 + s)
        _same("timesteps", sampling.timestep(sigma), told)
        _same("input", sampling.calculate_input(sigma, x.clone()), of_x, rounding)
        made = sampling.calculate_denoised(sigma, output.clone(), x.clone())
        _same("image", made, denoised, rounding)
        _same("added noise", sampling.noise_scaling(sigma, noise.clone(), image.clone()), x, rounding)


def why(error: Exception) -> str:
    """One sentence for any error: ours says it itself, one of the UI's own code is named."""
    if isinstance(error, RecordError):
        return f"its schedule record cannot be used: {error}"
    told = printable(f"{type(error).__name__}: {error}")
    return f"its schedule record cannot be followed in this version of the UI ({told}): update sdxl-fixes"


def printable(text: str) -> str:
    """One short line that the console can show: control characters, halves of surrogate pairs and letters
    that it lacks are escaped."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * SHOWN])
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    return line if len(line) <= SHOWN else line[: SHOWN // 2] + " ... " + line[-SHOWN // 2 :]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    return f"{value:g}" if isinstance(value, float) else f"a {type(value).__name__}"


def _same(what: str, found: Any, expected: Any, rounding: float = 0.0) -> None:
    import torch

    found, expected = found.detach().double(), expected.double()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=rounding):
        raise RecordError(
            f"the {what} would not be the record's in this version of the UI: update sdxl-fixes"
        )


def _json_object(content: str | bytes) -> dict[str, Any]:
    try:  # whole numbers as floats: those of a million digits would take minutes
        found = json.loads(content, parse_int=float)
    except RecursionError as error:
        raise RecordError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise RecordError(f"it is not JSON: {printable(str(error))}") from error
    if not isinstance(found, dict):
        raise RecordError("it is not a JSON object")
    return found


def _betas(values: Any) -> npt.NDArray[np.float64]:
    if isinstance(values, list) and len(values) >= 2 and all(type(beta) is float for beta in values):
        betas = np.array(values, dtype=np.float64)
        if ((betas > 0) & (betas <= 1)).all():
            return betas
    raise RecordError("its betas are not one row of numbers in (0, 1]")
