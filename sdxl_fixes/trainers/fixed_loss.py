"""The loss of a trainer's network on images, noise and timesteps that stay the same: what the stable training
loss and the held-out loss share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_map, tree_map_only

from sdxl_fixes.errors import FixError
from sdxl_fixes.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

# what tells an image's noise, its latents [C, H, W] and its conditioning (args, kwargs), without a batch
Sample = tuple[int, torch.Tensor, Any]


class Called(NamedTuple):
    """What is known of the training's calls of the network."""

    network: torch.nn.Module  # unwrapped
    dtype: torch.dtype  # of the noisy latents
    batch: int  # the largest yet


def seen(before: Called | None, network: torch.nn.Module, noisy: torch.Tensor) -> Called:
    """After another call of ``network``, with ``noisy`` [B, C, H, W]."""
    return Called(network, noisy.dtype, max(len(noisy), before.batch if before else 1))


def fixed_loss(
    validation: Validation, samples: Sequence[Sample], total: int, called: Called, accelerator: Accelerator
) -> dict[str, float]:
    """The numbers of :class:`Validation` over the ``samples`` of all processes, ``total`` of them."""
    sums = torch.zeros(2, len(validation.timesteps), device=accelerator.device)
    models = [*accelerator._models, called.network]
    for numbers, latents, conditioning in _groups(samples, accelerator.device):
        predict = _predict(called, conditioning, accelerator)
        sums += validation.sums(predict, latents, models, called.batch, numbers)
    return validation.means(accelerator.reduce(sums, "sum"), total)


def line(what: str, means: dict[str, float], images: int, validation: Validation) -> str:
    """The numbers for people."""
    return (
        f"{what} {means['loss']:.7g}, unweighted {means['loss_unweighted']:.7g} "
        f"({images} images x {len(validation.timesteps)} timesteps)"
    )


def _groups(samples: Sequence[Sample], device: torch.device) -> Iterator[tuple[list[int], torch.Tensor, Any]]:
    """Images of one shape and conditioning of one length together: numbers, latents [N, C, H, W],
    conditioning."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        shapes = tree_map_only(torch.Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), sample[1:])
        groups.setdefault(repr(shapes), []).append(sample)

    def stack(*values: Any) -> Any:
        return torch.stack(values).to(device) if isinstance(values[0], torch.Tensor) else values[0]

    for group in groups.values():
        latents, conditioning = tree_map(stack, *(sample[1:] for sample in group))
        yield [number for number, *_ in group], latents, conditioning


def _predict(called: Called, conditioning: Any, accelerator: Accelerator) -> Any:
    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor[images], conditioning)
        with accelerator.autocast():
            prediction = called.network(noisy.to(called.dtype), timesteps, *args, **kwargs)
        return prediction if isinstance(prediction, torch.Tensor) else prediction[0]

    return predict


def dealt(accelerator: Accelerator | AcceleratorState) -> str:
    """accelerate's word for how the processes share a model, of any of its versions: "NO", "FSDP"..."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def check_whole(accelerator: Accelerator | AcceleratorState, flag: str) -> None:
    """Raise FixError where a process lacks a part of the U-Net, which ``flag`` calls outside its
    wrapper."""
    kind = dealt(accelerator)
    plugin = getattr(getattr(accelerator, "state", accelerator), "deepspeed_plugin", None)
    if kind == "FSDP" or (kind == "DEEPSPEED" and getattr(plugin, "zero_stage", 3) == 3):
        raise FixError(
            f"{flag} needs the whole U-Net in every process, and FSDP and DeepSpeed ZeRO-3 deal it out: "
            "leave the flag out"
        )
