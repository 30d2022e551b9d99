"""Read the schedule record of a .safetensors file. Copied into UIs by ``sdxl-fixes comfyui install`` and
``sdxl-fixes webui install``.

It runs in the UI's own Python, where sdxl-fixes is not installed, so it needs numpy only. It is therefore the
one other place that turns betas into sigmas; a test holds it equal to sdxl_fixes.NoiseSchedule, bit for bit.
It reads 8 bytes and the JSON after them, nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RECORD_KEY, VERSION = "sdxl_fixes.schedule", 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
LIMIT = 100_000_000
ZERO_SNR_SIGMA = 4518.7636987  # where these UIs end zero terminal SNR, whose last sigma is infinite
MARKERS = ("v_pred", "ztsnr")


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

    def __str__(self) -> str:
        return f"{self.prediction_type}, sigma {self.sigmas[0]:.4g} to {self.sigmas[-1]:.6g}"


def read_schedule(path: str) -> Schedule | None:
    """The schedule of a file; None if it has no record. Raises ValueError, in one sentence, if it has a
    broken one."""
    header = read_header(path)
    metadata = header.get("__metadata__") if header else None
    text = metadata.get(RECORD_KEY) if isinstance(metadata, dict) else None
    if not header or not isinstance(metadata, dict) or not isinstance(text, str):
        return None
    prefixes = ("", "model.diffusion_model.")
    markers = tuple(name for name in MARKERS if any(prefix + name in header for prefix in prefixes))
    modelspec = metadata.get("modelspec.prediction_type")
    try:
        return parse_record(text, markers, modelspec if isinstance(modelspec, str) else None)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: its schedule record cannot be used: {error}") from error


def read_header(path: str) -> dict[str, Any] | None:
    """The JSON at the start of a safetensors file; None for anything else."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(size)) if size <= LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def parse_record(text: str, markers: tuple[str, ...] = (), modelspec: str | None = None) -> Schedule:
    """The schedule that a record describes."""
    record = json.loads(text)
    if record["format"] != RECORD_KEY or record["version"] != VERSION:
        raise ValueError(
            f"version {record['version']!r} of {record['format']!r} is not known here: update the node"
        )
    prediction_type = record["prediction_type"]
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction_type {prediction_type!r}")
    betas = np.array(record["betas"], dtype=np.float64)
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError("its betas are not one row of numbers in (0, 1]")
    sigmas = betas_to_sigmas(betas)
    if not (np.diff(sigmas) > 0).all():
        raise ValueError("its noise level does not rise at every timestep")
    zero_snr, shift = bool(np.isinf(sigmas[-1])), 1.0
    if prediction_type == "flow_prediction":
        sigmas[:-1] = sigmas[:-1] / (1 + sigmas[:-1])
        sigmas[-1] = 1.0 if zero_snr else sigmas[-1] / (1 + sigmas[-1])
        recipe = record["recipe"]
        shift = float(recipe[0]["shift"]) if len(recipe) == 1 and recipe[0].get("make") == "flow" else 1.0
    elif zero_snr:
        sigmas[-1] = max(ZERO_SNR_SIGMA, 2 * sigmas[-2])
    return Schedule(prediction_type, sigmas, shift, zero_snr, text, markers, modelspec)


def betas_to_sigmas(betas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sqrt((1 - alphas_cumprod)/alphas_cumprod), infinite where nothing of the image is left."""
    alphas_cumprod = np.cumprod(1 - betas)
    with np.errstate(divide="ignore", over="ignore"):
        sigmas: npt.NDArray[np.float64] = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return sigmas
