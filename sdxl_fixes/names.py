"""Names that flags, configs and records take. They import no torch, so that what only reads or checks them
(the command line, the metadata of files) starts at once."""

from __future__ import annotations

import operator
from typing import Any

from sdxl_fixes.errors import shown

FLOW = "flow_prediction"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", FLOW)
HUBER_KINDS = ("huber", "smooth_l1")
LOSS_TYPES = ("l2", "l1", *HUBER_KINDS)
HUBER_SCHEDULES = ("constant", "exponential", "snr")
HUBER_SCHEDULE, HUBER_C, HUBER_SCALE = "snr", 0.1, 1.0  # where nothing is said
DENSITIES = ("uniform", "logit_normal", "laplace", "mode", "beta")
CHUNK = 75  # tokens of a prompt; 77 with BOS and EOS
SPLITS = ("none", "commas")
LEFTOVERS = ("merge", "smaller", "drop")


def check_seed(seed: Any) -> int:
    """Return it as an int, or raise ValueError: what orders are drawn by is 64 bits, as torch's seeds are."""
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole < 2**64:
        raise ValueError(f"seed must be a whole number in 0..{2**64 - 1}, got {shown(seed)}")
    return whole


def check_prediction_type(prediction_type: str) -> str:
    """Return it, or raise ValueError naming the four that exist."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {shown(prediction_type)}: expected one of {', '.join(PREDICTION_TYPES)}"
        )
    return prediction_type
