"""What a full finetune of SDXL's U-Net keeps beside the activations: the bytes of weights, gradients and
states, counted on the tensors that each optimizer makes.

python benchmarks/optimizer_bytes.py     prints the table of docs/recipes.md; a minute of one core

Needs `pip install torchao torch-optimi transformers bitsandbytes`.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lab
import torch
from torch.nn import Parameter

RESULT = "optimizer-bytes"
Shapes = Mapping[tuple[int, ...], int]  # shape -> how many tensors have it


@dataclass(frozen=True)
class Kept:
    """An optimizer by its class, its options, and the dtype of weights and gradients."""

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    released: bool = True  # something lets go of its gradients

    def states(self, shapes: Shapes) -> int:
        """Bytes of the states of all parameters."""
        return sum(count * self.of(shape) for shape, count in shapes.items())

    def of(self, shape: tuple[int, ...]) -> int:
        """Bytes that the states of one more parameter take, after a step; what they share is not counted."""
        first, second = (Parameter(torch.zeros(shape, dtype=self.dtype)) for _ in range(2))
        for parameter in (first, second):
            parameter.grad = torch.zeros_like(parameter)
        module, _, name = self.path.rpartition(".")
        optimizer = getattr(importlib.import_module(module), name)([first, second], lr=1e-5, **self.options)
        optimizer.step()
        one, other = (dict(storages(optimizer.state[p].values())) for p in (first, second))
        return sum(size for place, size in other.items() if place not in one)


def storages(values: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the memory of tensors, also of those that are made of others."""
    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            yield from storages(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor) and value.numel():
            yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()


_KOHYA = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # the recipe's
OPTIMIZERS = {
    "torch's AdamW, float32 weights": Kept("torch.optim.AdamW", dtype=torch.float32),
    "torch's AdamW": Kept("torch.optim.AdamW"),
    "`torchao.optim.AdamW8bit`": Kept("torchao.optim.AdamW8bit"),
    "`torchao.optim.AdamW4bit`": Kept("torchao.optim.AdamW4bit"),
    "`optimi.AdamW` (`pip install torch-optimi`), Kahan sums": Kept("optimi.AdamW", released=False),
    "bitsandbytes' AdamW8bit": Kept("bitsandbytes.optim.AdamW8bit", released=False),
    "Adafactor, kohya's `fused_backward_pass`": Kept("transformers.optimization.Adafactor", _KOHYA),
}


def shapes() -> Counter[tuple[int, ...]]:
    """Of the parameters of SDXL's U-Net."""
    with torch.device("meta"):
        return Counter(tuple(parameter.shape) for parameter in lab.sdxl_unet().parameters())


def average(shape: tuple[int, ...]) -> int:
    """Bytes of --ema_decay's average of a parameter."""
    from diffusers.training_utils import EMAModel

    (shadow,) = EMAModel([torch.zeros(shape, dtype=torch.bfloat16).float()]).shadow_params
    return int(shadow.untyped_storage().nbytes())


def counted() -> dict[str, Any]:
    """Name -> bytes."""
    torch.compiler.set_stance(
        "force_eager"
    )  # torchao compiles a step for every shape; the states are the same
    found, known = {}, shapes()
    largest = max(map(math.prod, known))
    for name, kept in OPTIMIZERS.items():
        number = sum(count * math.prod(shape) for shape, count in known.items())
        weights = number * kept.dtype.itemsize
        found[name] = {
            "weights": weights,
            "states": kept.states(known),
            "gradients": weights,
            "released": largest * kept.dtype.itemsize if kept.released else None,
        }
    found["average"] = sum(count * average(shape) for shape, count in known.items())
    found["parameters"] = number
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """In GB (10^9 bytes), and the states in bytes a parameter."""
    lines = [
        "| optimizer | states, bytes a parameter | weights, states | and gradients | released |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in OPTIMIZERS:
        bytes_ = found[name]
        still, released = bytes_["weights"] + bytes_["states"], bytes_["released"]
        each = bytes_["states"] / found["parameters"]
        kept = gigabytes(still + bytes_["gradients"])
        freed = "" if released is None else gigabytes(still + released)
        lines.append(f"| {name} | {each:.2f} | {gigabytes(still)} | {kept} | {freed} |")
    return lines


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    print("\n".join(table(lab.cached(RESULT, counted))))
