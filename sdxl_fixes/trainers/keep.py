"""``--keep_base`` in a trainer: the frozen base beside the U-Net that is trained, called once more in every
training step.

With a LoRA the base is the U-Net itself, without the LoRA for that one call: each layer gets its own forward
back, whatever kind of network replaced it. (A multiplier of 0 would run the LoRA all the same: it draws
dropout's random numbers, and autocast would keep its weights, cast under no_grad, for the call that is
trained.) In a full finetuning it is a copy of the U-Net, made before the first step in the precision that the
training computes in.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.errors import FixError
from sdxl_fixes.log import rank, say
from sdxl_fixes.teacher import Teacher
from sdxl_fixes.trainers.step import StepState

if TYPE_CHECKING:
    from accelerate import Accelerator

Forward = Callable[..., Any]
_NONE = object()


class Keep:
    """What a run with ``--keep_base`` works with: the ``teacher`` of the ``base``, and the base's network
    once the U-Net is known."""

    def __init__(self, teacher: Teacher, base: Sampling) -> None:
        self.teacher, self.base = teacher, base
        self._network: torch.nn.Module | None = None  # the base's; the trained one itself beside a LoRA
        self._changes: list[
            tuple[torch.nn.Module, str, Any]
        ] = []  # that make it the base: layer, name, value

    def noised(
        self, step: StepState, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> None:
        """Clean ``latents`` [B, C, H, W] were noised with ``noise`` (without a perturbation) at ``timesteps``
        [B], rows of the schedule; the U-Net is called next."""
        step.asked, step.answer = self.teacher.sample(latents, noise, timesteps.to(latents.device)), None

    def called(
        self,
        step: StepState,
        forward: Forward,
        network: torch.nn.Module,
        noisy: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """``network`` (unwrapped) is called with ``noisy``, timesteps (not given here) and the conditioning
        ``args`` and ``kwargs``; ``forward`` is its class's own. In training the base is asked first. Raises
        FixError for a call that is not of what was noised."""
        asked, step.asked = step.asked, None
        # a graph cannot hold a second call: the run will say that this was not reached
        if asked is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        sample, told = asked
        if sample.shape != noisy.shape:
            raise FixError(
                f"--keep_base: noised are {list(sample.shape)} and the U-Net is given {list(noisy.shape)}: "
                "this trainer gives it something else, too, so leave the flag out"
            )
        self.start(network)
        assert self._network is not None and step.timesteps is not None
        with torch.no_grad(), self._bare():
            output = forward(self._network, sample.to(noisy.dtype), told, *args, **kwargs)
            output = output if isinstance(output, torch.Tensor) else output[0]
            step.answer = self.teacher.answer(sample, output, step.timesteps.to(sample.device))

    def target(self, step: StepState, prediction: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """The target of ``prediction`` [b, C, H, W] (the batch, or a half that was split off) in place of the
        ``data``'s; the data's own where the base was not asked (validation)."""
        if step.answer is None:
            return data
        answer, timesteps = step.of(prediction, step.answer), step.of(prediction)
        return self.teacher.mix(answer, data, timesteps.to(data.device))

    def start(self, network: torch.nn.Module) -> None:
        """Take the base from ``network`` before it is changed: the first call counts. Raises FixError where
        the U-Net is dealt out to processes or not trained."""
        if self._network is not None:
            return
        _check_whole()
        if own := _replaced(network):
            self._network = network
            self._changes = [(layer, "forward", forward) for layer, forward in own]
            self._changes += [
                (layer, "gradient_checkpointing", False)
                for layer in network.modules()
                if layer.__dict__.get("gradient_checkpointing")
            ]
        elif any(parameter.requires_grad for parameter in network.parameters()):
            self._network = _frozen_copy(network)
        else:
            raise FixError(
                "--keep_base: neither the U-Net nor a network of its layers is trained here, so nothing is "
                "converted: leave the flag out"
            )

    def loading(self, accelerator: Accelerator) -> None:
        """A saved state will be loaded into the models of ``accelerator``: the base is in them now."""
        for model in accelerator._models:
            network = accelerator.unwrap_model(model)
            if "UNet2DConditionModel" in type(network).__name__:
                self.start(network)

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """The base's network without a LoRA, and without gradient checkpointing, which no_grad has no use
        for; the recomputation in the backward pass comes later, and finds both again."""
        before = [(module, name, module.__dict__.get(name, _NONE)) for module, name, _ in self._changes]
        try:
            for module, name, value in self._changes:
                module.__dict__[name] = value
            yield
        finally:
            for module, name, had in before:
                if had is _NONE:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = had


def _replaced(network: torch.nn.Module) -> list[tuple[torch.nn.Module, Forward]]:
    """The layers of ``network`` that run something else than their own forward, with their own: those whose
    forward is a method of a module outside the network (kohya's networks, LyCORIS), and peft's, which hold
    the layer inside."""
    own, found = set(network.modules()), list[tuple[torch.nn.Module, Forward]]()
    for module in own:
        owner = getattr(module.__dict__.get("forward"), "__self__", None)
        inside = getattr(module, "get_base_layer", None)
        if isinstance(owner, torch.nn.Module) and owner not in own:
            found.append((module, type(module).forward.__get__(module)))
        elif callable(inside):
            found.append((module, inside().forward))
    return found


def _frozen_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy in the dtype of the trainer's mixed precision, in evaluation mode, on the same device. Weights
    are cast one at a time, so that no second copy in full precision ever exists."""
    from accelerate.state import AcceleratorState

    precision = AcceleratorState().mixed_precision if AcceleratorState._shared_state else "no"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(precision))
    cast: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(
            parameter.detach().to(dtype or parameter.dtype, copy=True), requires_grad=False
        )
        for parameter in network.parameters()
    }
    made = copy.deepcopy(network, cast).eval()
    made.__dict__.pop("forward", None)  # accelerate's, for the trained one
    if rank() == 0:
        size = sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
        say(f"--keep_base: a frozen copy of the U-Net, {size / 1e9:.2f} GB on every device")
    return made


def _check_whole() -> None:
    from accelerate.state import AcceleratorState

    from sdxl_fixes.trainers.fixed_loss import check_whole

    if AcceleratorState._shared_state:
        check_whole(AcceleratorState(), "--keep_base")
