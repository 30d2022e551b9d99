"""Names that flags, configs and records take. They import no torch, so that what only reads or checks them
(the command line, the metadata of files) starts at once."""

from __future__ import annotations

from sdxl_fixes.errors import shown

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
HUBER_KINDS = ("huber", "smooth_l1")
LOSS_TYPES = ("l2", "l1", *HUBER_KINDS)
HUBER_SCHEDULES = ("constant", "exponential", "snr")
HUBER_SCHEDULE, HUBER_C, HUBER_SCALE = "snr", 0.1, 1.0  # where nothing is said
DENSITIES = ("uniform", "logit_normal", "laplace", "mode", "beta")
CHUNK = 75  # tokens of a prompt; 77 with BOS and EOS
SPLITS = ("none", "commas")
LEFTOVERS = ("merge", "smaller", "drop")


def check_prediction_type(prediction_type: str) -> str:
    """Return it, or raise ValueError naming the four that exist."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {shown(prediction_type)}: expected one of {', '.join(PREDICTION_TYPES)}"
        )
    return prediction_type
