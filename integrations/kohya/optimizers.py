"""Training in 16 bits: an optimizer that steps during the backward pass, and settings that cannot learn.

Libraries have the optimizers, and kohya's ``--optimizer_type module.Class`` takes them by name. What none has
is AdamW that lets go of each gradient as soon as it is used, under accelerate: kohya's
``--fused_backward_pass`` is Adafactor's, and optimi's gradient release keeps its learning rate in states that
accelerate copies, so that no scheduler reaches it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError, FlagError, shown
from sdxl_fixes.log import world_size
from sdxl_fixes.trainers.report import lost_above

from .run import SESSION

if TYPE_CHECKING:
    from torch.optim import Optimizer

RELEASED = f"{__name__}.released"
_TORCHAO = "torchao.optim."
# what counts its steps per parameter, so that a step of one parameter is a step of that parameter alone
KNOWN = (
    "torch.optim.AdamW",
    *(f"{_TORCHAO}{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW")),
    "sdxl_fixes.trainers.adamw.AdamW",
)
# kohya's names of optimizers that round weights to nearest, with steps of about the learning rate
_TO_NEAREST = (
    *("adamw", "adamw8bit", "pagedadamw", "pagedadamw8bit", "pagedadamw32bit", "torch.optim.adamw"),
    *("lion", "lion8bit", "pagedlion8bit"),
)
ROUNDED = f"--optimizer_type {_TORCHAO}AdamW8bit --optimizer_args bf16_stochastic_round=True"


def released(
    parameters: Iterable[Any], lr: float, name: str = "torch.optim.AdamW", **options: Any
) -> Optimizer:
    """The optimizer ``name`` with its ``options``, for kohya's ``--optimizer_type``: steps each parameter as
    soon as its gradient is complete, and lets go of the gradient. Raises FixError outside a training that was
    started with the plugin, FlagError for an optimizer of which it is not known to be right."""
    if SESSION.run is None:
        raise FixError(
            f"{RELEASED} needs a training that is started with -m sdxl_fixes.kohya, which refuses what does "
            "not go with it: nothing was trained"
        )
    if name not in KNOWN:
        raise FlagError(
            f"--optimizer_args name={shown(name)}: expected one of {', '.join(KNOWN)}, which count steps per "
            "parameter: take one of these"
        )
    module, _, kind = name.rpartition(".")
    try:
        made: Optimizer = getattr(importlib.import_module(module), kind)(parameters, lr=lr, **options)
    except ModuleNotFoundError as error:
        raise FlagError(f"--optimizer_args name={name!r} needs {error.name}: pip install torchao") from error
    for number, group in enumerate(made.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(partial(_step, made, number))
    return made


def _step(optimizer: Optimizer, number: int, parameter: torch.Tensor) -> None:
    """A step of one parameter of the group ``number``, which is looked up each time: resuming makes new
    groups."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[number], "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None


def check(args: argparse.Namespace) -> None:
    """Raise FlagError for what does not go with gradients that are let go of."""
    if getattr(args, "optimizer_type", None) != RELEASED:
        return
    wrong = {
        "--max_grad_norm 0": (getattr(args, "max_grad_norm", 0.0) or 0.0) != 0.0,
        "--gradient_accumulation_steps 1": (getattr(args, "gradient_accumulation_steps", 1) or 1) > 1,
        "one process": world_size() > 1,
        "--mixed_precision bf16": getattr(args, "mixed_precision", None) == "fp16",
        "no --fused_backward_pass": bool(getattr(args, "fused_backward_pass", False)),
        "no --fused_optimizer_groups": bool(getattr(args, "fused_optimizer_groups", None)),
        "no --deepspeed": bool(getattr(args, "deepspeed", False)),
    }
    if needed := [flag for flag, is_wrong in wrong.items() if is_wrong]:
        raise FlagError(
            f"--optimizer_type {RELEASED} uses each gradient before the next is there, so that their norm "
            "cannot be clipped, and none is summed over steps or processes, or scaled afterwards: give "
            f"{', '.join(needed)}"
        )


def cannot_learn(args: argparse.Namespace) -> list[str]:
    """Sentences about weights in 16 bits that steps of this size do not reach."""
    name, options = _named(args)
    found, rate, eps = list[str](), getattr(args, "learning_rate", None), options.get("eps", 1e-8)
    if getattr(args, "full_fp16", False) and name in ("adamw", "torch.optim.adamw") and _is_zero(eps):
        found.append(
            f"--full_fp16 with {name}: its eps of {eps:g} is 0 in float16, and so is the square of a small "
            "gradient, so that weights become NaN by 0/0: take --mixed_precision bf16 --full_bf16 "
            f"{ROUNDED}, or leave out --full_fp16"
        )
    lost = lost_above(rate) if isinstance(rate, float) else None
    if getattr(args, "full_bf16", False) and lost is not None and _to_nearest(args, name, options):
        found.append(
            f"--full_bf16 with {name} rounds weights to nearest, and a step of --learning_rate {rate:g} "
            f"is lost in every weight above {lost:.2g}: {ROUNDED} rounds stochastically"
        )
    return found


def _named(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The optimizer's name in small letters as kohya compares it, and its options, those that can be read."""
    name = getattr(args, "optimizer_type", None) or "AdamW"
    if getattr(args, "use_8bit_adam", False):
        name = "AdamW8bit"
    options = {}
    for word in getattr(args, "optimizer_args", None) or ():
        key, _, value = word.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            continue  # kohya refuses it in its own words
    if name == RELEASED:
        name = options.pop("name", "torch.optim.AdamW")
    return str(name).lower(), options


def _to_nearest(args: argparse.Namespace, name: str, options: dict[str, Any]) -> bool:
    if name == "adafactor":  # kohya's own fused step rounds stochastically
        return not getattr(args, "fused_backward_pass", False)
    if name.startswith("optimi."):
        return options.get("kahan_sum") is False
    if name.startswith(_TORCHAO):
        return not options.get("bf16_stochastic_round")
    return name in _TO_NEAREST


def _is_zero(eps: Any) -> bool:
    return isinstance(eps, float) and float(torch.tensor(eps, dtype=torch.float16)) == 0.0
