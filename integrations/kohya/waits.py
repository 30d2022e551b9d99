"""--speed syncs: no training step waits for the GPU.

A host that waits cannot queue the next step meanwhile. Upstream waits 16 times a step and more: for each of
the batch's tensors to be copied, for the timesteps and the frequencies of the size embedding, twice for the
schedule's table, for the check of latents for NaN, for weights sample by sample (which the fix weighting
looks up at once), and for the loss. Copies come from pinned memory here; the loss is read one step later,
when the next is queued, and everything that hangs on it is said then: the same numbers, of the same steps.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sdxl_fixes.errors import FixError

from .loop import Edit, call, changed, expression
from .run import SESSION
from .speed import reached
from .speed_flags import parts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SchedulerMixin

_HERE = "_sdxl_fixes_waits"  # this module's object among the trainer's globals
_HOST = torch.device("cpu")


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` of the host on ``device``, without waiting for the copy."""
    if device == _HOST or device.type == "mps":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Later:
    """A number on its way from the device: :meth:`read` waits for it and for nothing that was queued
    since."""

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        self.value: float | None = None
        on_gpu = tensor is not None and tensor.is_cuda
        waits = tensor is not None and tensor.device.type not in ("cpu", "cuda")  # no event would tell
        self._host = None if tensor is None else tensor.detach().to("cpu", non_blocking=not waits)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        """The number."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._host is not None:
            self.value, self._host, self._copied = self._host.item(), None, None
        assert self.value is not None
        return self.value


def _known(value: Any) -> Any:
    """``value``, or the mapping's values, with what came later."""
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items()}
    return value.read() if isinstance(value, Later) else value


class Recorder:
    """Upstream's running average of the loss, which whoever asks it finds up to date."""

    def __init__(self, made: Any, waits: Waits) -> None:
        self._made, self._waits = made, waits

    def __getattr__(self, name: str) -> Any:
        self._waits.catch_up()
        return getattr(self._made, name)


class Waits:
    """What the loop asks in place of waiting, and what is still to be said, in order."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """No training."""
        self.edited = False  # the loop that runs asks here
        self.pinned = False  # its batches come from pinned memory
        self._left: list[Callable[[], None]] = []

    def catch_up(self) -> None:
        """Say what is still to be said."""
        while self._left:
            self._left.pop(0)()

    # ------------------------------------------------------------------ what the edited loop calls

    @contextlib.contextmanager
    def said(self) -> Iterator[None]:
        """An epoch's steps, after which nothing is left to say, also where an error or Ctrl-C ends them; but
        for what a GPU that failed cannot tell."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self.catch_up()
            raise
        self.catch_up()

    def recorder(self, made: Any) -> Recorder:
        """Upstream's recorder; the loop is about to begin. Raises FixError if its data were not prepared."""
        if not self.pinned:
            raise FixError(
                "--speed syncs: this sd-scripts did not prepare its training data as we know it, so every "
                "batch would be waited for: leave syncs out"
            )
        reached("syncs")
        return Recorder(made, self)

    def loss(self, loss: torch.Tensor) -> Later:
        """In place of ``loss.item()``."""
        self.catch_up()
        return Later(loss)

    def record(self, recorder: Recorder, **step: Any) -> None:
        """In place of ``recorder.add``."""
        self._left.append(lambda: recorder._made.add(**_known(step)))

    def average(self, recorder: Recorder) -> Later:
        """In place of ``recorder.moving_average``: what it is after the step that was recorded last."""
        made = Later()
        self._left.append(lambda: setattr(made, "value", recorder._made.moving_average))
        return made

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A call for its effect, of what is not known yet."""
        self._left.append(lambda: function(*map(_known, args), **_known(kwargs)))

    def finite(self, latents: torch.Tensor, say: Callable[[], Any]) -> torch.Tensor:
        """``latents`` with 0 for NaN (and, as upstream, the largest number for infinity, if there is NaN),
        of which is said when it is known."""
        wrong = torch.isnan(latents).any()
        flag = Later(wrong)
        self._left.append(lambda: say() if flag.read() else None)
        return torch.where(wrong, torch.nan_to_num(latents, 0), latents)


WAITS = Waits()


def prepare_data_loader(
    original: Callable[..., Any], self: Accelerator, data_loader: Any, *args: Any, **kwargs: Any
) -> Any:
    """Batches in pinned memory, from where accelerate copies them without waiting. Raises FixError for an
    accelerate that always waits."""
    if _on():
        if not hasattr(getattr(self, "dataloader_config", None), "non_blocking"):
            raise FixError("--speed syncs needs accelerate 0.30 or newer: update it, or leave syncs out")
        self.dataloader_config.non_blocking = data_loader.pin_memory = WAITS.pinned = True
    return original(self, data_loader, *args, **kwargs)


def timesteps(
    original: Callable[..., torch.Tensor],
    min_timestep: int,
    max_timestep: int,
    b_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Upstream's draw, which is made on the host."""
    if not _on():
        return original(min_timestep, max_timestep, b_size, device)
    return sent(original(min_timestep, max_timestep, b_size, _HOST), device)


def embedding(
    original: Callable[..., torch.Tensor], timesteps: torch.Tensor, dim: int, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Upstream's embedding of sizes, whose frequencies are made where they are needed."""
    if not _on():
        return original(timesteps, dim, *args, **kwargs)
    with timesteps.device:
        return original(timesteps, dim, *args, **kwargs)


def noised(
    original: Callable[..., Any],
    args: argparse.Namespace,
    noise_scheduler: SchedulerMixin,
    latents: torch.Tensor,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Upstream's noising, which fetches the scheduler's table from the device to send it there again. Its own
    Huber loss looks up in the one that was fetched."""
    run = SESSION.run
    if _on() and run is not None and ("loss" in run.on or run.flags.loss_type in ("l1", "l2")):
        noise_scheduler = _Staying(noise_scheduler)
    return original(args, noise_scheduler, latents, *rest, **kwargs)


class _Staying:
    """A scheduler whose table stays where its own code brings it."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.__dict__["_scheduler"] = scheduler

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        return torch.empty(0)  # read to be moved, and put back by the setter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "alphas_cumprod":
            setattr(self.__dict__["_scheduler"], name, value)


def sampled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The place of the previews, after every optimizer step: by now the step before is done."""
    WAITS.catch_up()
    return original(*args, **kwargs)


def batch(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The network trainer's batch, whose latents are checked. Validation waits for every batch, and what it
    says comes after what is left of the step before it."""
    if not _on():
        return original(self, *args, **kwargs)
    if not kwargs.get("is_train", True):
        WAITS.catch_up()
        return original(self, *args, **kwargs)
    if original not in _BATCHES:
        _BATCHES[original] = changed(original, [LATENTS])
    return _BATCHES[original](self, *args, **kwargs)


_BATCHES: dict[Callable[..., Any], Callable[..., Any]] = {}


def _on() -> bool:
    run = SESSION.on("speed")
    return run is not None and "syncs" in parts(run.args)


# ---------------------------------------------------------------------- the edits


def _edit(function: ast.FunctionDef) -> dict[str, int]:
    """Let the loop ask; returns how often each of what is needed was there."""
    counts = dict.fromkeys(
        ("loss_recorder = ...", "for step, batch in enumerate(... train_dataloader)",
         "current_loss = loss.detach().item()", "loss_recorder.add(...)",
         "avr_loss: float = loss_recorder.moving_average", "progress_bar.set_postfix(...)",
         "logs to the trackers"), 0
    )  # fmt: skip
    for body in _blocks(function):
        for place, statement in enumerate(body):
            if isinstance(statement, ast.Assign) and ast.unparse(statement).startswith("loss_recorder = "):
                counts["loss_recorder = ..."] += 1
                statement.value = call(_HERE, "recorder", statement.value)
            elif isinstance(statement, ast.For) and _over_batches(statement):
                counts["for step, batch in enumerate(... train_dataloader)"] += 1
                _edit_steps(statement, counts)
                body[place] = ast.With([ast.withitem(call(_HERE, "said"))], [statement])
    if function.args.args[0].arg != "self":  # else its batches are a method
        counts |= _edit_latents(function)
    return counts


def _blocks(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    """Every list of statements in it."""
    parts = [getattr(node, name, None) for node in ast.walk(function) for name in ("body", "orelse")]
    return [part for part in parts if isinstance(part, list)]


def _over_batches(loop: ast.For) -> bool:
    iterated = ast.unparse(loop.iter)
    return ast.unparse(loop.target).strip("()") == "step, batch" and iterated.endswith("train_dataloader)")


def _edit_steps(loop: ast.For, counts: dict[str, int]) -> None:
    """The statements of a step, those that stand in the loop itself: validation has others like them."""
    for statement in loop.body:
        text = ast.unparse(statement)
        value: Any = getattr(statement, "value", None)
        if text == "current_loss = loss.detach().item()":
            statement.value = expression(f"{_HERE}.loss(loss)")  # type: ignore[attr-defined]
        elif text.startswith("loss_recorder.add(") and not value.args:
            text = "loss_recorder.add(...)"
            recorder = expression("loss_recorder")
            statement.value = call(_HERE, "record", recorder, keywords=value.keywords)  # type: ignore[attr-defined]
        elif text == "avr_loss: float = loss_recorder.moving_average":
            statement.value = expression(f"{_HERE}.average(loss_recorder)")  # type: ignore[attr-defined]
        elif text.startswith("progress_bar.set_postfix("):
            text = "progress_bar.set_postfix(...)"
            statement.value = _deferred(value)  # type: ignore[attr-defined]
        elif isinstance(statement, ast.If):
            for inner in statement.body:
                if ast.unparse(inner) in _LOGS:
                    text = "logs to the trackers"
                    inner.value = _deferred(inner.value)  # type: ignore[attr-defined]
        if text in counts:
            counts[text] += 1


_LOGS = (
    "accelerator.log(logs, step=global_step)",
    "self.step_logging(accelerator, logs, global_step, epoch + 1)",
)


def _deferred(made: ast.Call) -> ast.Call:
    return call(_HERE, "call", made.func, *made.args, keywords=made.keywords)


def _edit_latents(function: ast.FunctionDef) -> dict[str, int]:
    """Let the check of latents ask; returns how often it was there."""
    text = "if torch.any(torch.isnan(latents)): ..."
    counts = {text: 0}
    for body in _blocks(function):
        for place, statement in enumerate(body):
            if (
                isinstance(statement, ast.If)
                and ast.unparse(statement.test) == "torch.any(torch.isnan(latents))"
                and [type(part) for part in statement.body] == [ast.Expr, ast.Assign]
                and "torch.nan_to_num(latents, 0, out=latents)" in ast.unparse(statement.body[1])
            ):
                counts[text] += 1
                say = ast.Lambda(expression("lambda: 0").args, statement.body[0].value)  # type: ignore[attr-defined]
                finite = call(_HERE, "finite", expression("latents"), say)
                body[place] = ast.Assign([ast.Name("latents", ast.Store())], finite)
    return counts


_WRONG = "wait for the GPU"
EDIT = Edit("--speed syncs", WAITS, _HERE, _edit, "", _WRONG)
LATENTS = Edit("--speed syncs", WAITS, _HERE, _edit_latents, "", _WRONG)
