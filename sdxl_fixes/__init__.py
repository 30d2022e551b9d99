"""One noise schedule rules everything: zero terminal SNR, scheduled Huber, input perturbation and finite
weights for SDXL training.

What ``__all__`` names is imported when it is first asked for: ``import sdxl_fixes`` itself imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sdxl_fixes.version import __version__

if TYPE_CHECKING:
    from sdxl_fixes import schedulers
    from sdxl_fixes.buckets import ChunkBucketBatchSampler
    from sdxl_fixes.checkpoint import Sampling, markers, metadata
    from sdxl_fixes.loss import Loss, ScheduledHuber
    from sdxl_fixes.model_files.model_file import read_sampling
    from sdxl_fixes.noise import InputPerturbation, OffsetNoise
    from sdxl_fixes.objective import Objective, Step
    from sdxl_fixes.schedule import NoiseSchedule
    from sdxl_fixes.schedulers import fix_scheduler
    from sdxl_fixes.timesteps import TimestepSampler
    from sdxl_fixes.weighting import Debiased, MinSNR, SoftMinSNR

__all__ = [
    "ChunkBucketBatchSampler",
    "Debiased",
    "InputPerturbation",
    "Loss",
    "MinSNR",
    "NoiseSchedule",
    "Objective",
    "OffsetNoise",
    "Sampling",
    "ScheduledHuber",
    "SoftMinSNR",
    "Step",
    "TimestepSampler",
    "__version__",
    "fix_scheduler",
    "markers",
    "metadata",
    "read_sampling",
    "schedulers",
]

_HOMES = {  # the module of each name; schedulers is one itself
    "buckets": ("ChunkBucketBatchSampler",),
    "checkpoint": ("Sampling", "markers", "metadata"),
    "loss": ("Loss", "ScheduledHuber"),
    "model_files.model_file": ("read_sampling",),
    "noise": ("InputPerturbation", "OffsetNoise"),
    "objective": ("Objective", "Step"),
    "schedule": ("NoiseSchedule",),
    "schedulers": ("fix_scheduler",),
    "timesteps": ("TimestepSampler",),
    "weighting": ("Debiased", "MinSNR", "SoftMinSNR"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name == home or name in names:
            module = importlib.import_module(f"{__name__}.{home}")
            return module if name == home else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
