"""One noise schedule rules everything: zero terminal SNR, scheduled Huber, input perturbation and finite
weights for SDXL training."""

from sdxl_fixes.loss import Loss, ScheduledHuber
from sdxl_fixes.noise import InputPerturbation, OffsetNoise
from sdxl_fixes.objective import Objective, Step
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.timesteps import TimestepSampler
from sdxl_fixes.version import __version__
from sdxl_fixes.weighting import Debiased, MinSNR, SoftMinSNR

__all__ = [
    "Debiased",
    "InputPerturbation",
    "Loss",
    "MinSNR",
    "NoiseSchedule",
    "Objective",
    "OffsetNoise",
    "ScheduledHuber",
    "SoftMinSNR",
    "Step",
    "TimestepSampler",
    "__version__",
]
