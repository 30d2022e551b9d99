"""--exact_resume: kohya's training loops go on after exactly the step that a state was saved at.

Neither sdxl_train.py nor train_network.py can be told where to begin, so their loop is edited (loop.py) to
ask here.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler

from sdxl_fixes.errors import FixError
from sdxl_fixes.log import say, warn

from .loop import Edit, call, expression
from .order import TRAINING, Order, Ordered, seed_everything
from .run import SESSION

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_HERE = "_sdxl_fixes_resume"  # this module's object among the trainer's globals


@dataclass(frozen=True)
class Place:
    """Where a training stands: ``step`` optimizer steps are done, and ``items`` of the batches of ``epoch``
    (from 0; of all ranks); the rest is what that hangs on, and the log's running average."""

    step: int
    epoch: int
    items: int
    seed: int
    data: str
    world_size: int
    accumulation: int
    losses: tuple[float, ...] = ()
    total: float = 0.0


class Resume:
    """What the loop asks, and where it stands."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """No training."""
        self.edited = False  # the loop that runs asks here
        self.order: Order | None = None
        self.place: Place | None = None
        self._recorder: Any = None
        self._inside = False  # a batch is being trained
        self._batch = 0  # its number in the epoch
        self.loss: Any = None  # of it

    # ------------------------------------------------------------------ what the edited loop calls

    def first(self, args: argparse.Namespace) -> int:
        """Optimizer steps that are done. Raises FixError if none is left."""
        step = self._place().step
        if step >= args.max_train_steps:
            raise FixError(
                f"--resume {args.resume} is at step {step} of {args.max_train_steps}, so nothing is left to "
                "train: give more --max_train_steps (--max_train_epochs), or an earlier state"
            )
        return step

    def recorder(self, made: Any) -> Any:
        """Upstream's running average of the loss, where it stood."""
        place, self._recorder = self._place(), made
        made.loss_list, made.loss_total = list(place.losses), place.total
        return made

    def epochs(self, args: argparse.Namespace) -> range:
        """The epochs from where it stood to the last step. Upstream's number of them is the same on the ranks
        that the training began with."""
        place, order = self._place(), self._order()
        each, rest = (
            -(-max(0, count) // place.world_size // place.accumulation)
            for count in (order.count, order.count - place.items)
        )
        left = args.max_train_steps - place.step - rest
        return range(place.epoch, place.epoch + 1 + max(0, -(-left // each)))

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(step in the epoch, batch) of the rest of the epoch; each is trained with generators of its own
        seed."""
        from accelerate.state import GradientState, PartialState

        SESSION.reached("resume")
        place, order, rank = self._place(), self._order(), PartialState().process_index
        world = order.world_size
        order.go(place.epoch, place.items, place.step)
        items = list(order.items())[rank::world]
        for number, (item, batch) in enumerate(zip(items, loader, strict=True) if items else ()):
            self.place = replace(self._place(), items=place.items + (number + 1) * world)
            self._inside, self._batch = True, place.items // world + number
            seed_everything(item, TRAINING)
            try:
                yield self._batch, batch
            finally:
                self._inside = False
                done = self._place()
                self.place = replace(done, step=done.step + GradientState().sync_gradients)
        self.place = replace(self._place(), epoch=place.epoch + 1, items=0)

    # ------------------------------------------------------------------ states

    def state(self) -> dict[str, Any] | None:
        """What a state says of the place; None without the fix. States are saved after an optimizer step,
        within it, where upstream has yet to record its loss, or between two epochs."""
        if SESSION.on("resume") is None:
            return None
        place, recorder = self._place(), copy.deepcopy(self._recorder)
        if recorder is not None and self._inside:
            recorder.add(epoch=place.epoch, step=self._batch, loss=self.loss.item())
        losses = (tuple(recorder.loss_list), recorder.loss_total) if recorder is not None else ((), 0.0)
        return asdict(replace(place, step=place.step + self._inside, losses=losses[0], total=losses[1]))

    def load(self, folder: str, said: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` said. Raises FixError for another seed or other data, ValueError or
        TypeError for what it did not say."""
        place, here = Place(**{**said, "losses": tuple(said["losses"])}), self._place()
        numbers = (place.step, place.epoch, place.items, place.world_size - 1, place.accumulation - 1)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"its place is {numbers}")
        if place.seed != here.seed:
            raise FixError(
                f"{folder} was trained with --seed {place.seed}, and this run has --seed {here.seed}: "
                "--exact_resume needs the same"
            )
        if place.data != here.data:
            raise FixError(
                f"{folder} was trained with other data (images, repeats, buckets or batch size): "
                "--exact_resume needs the same, without it the state's weights can be trained on"
            )
        self.place = self._on_these_ranks(place, here)
        if self.place.step:
            say(f"--exact_resume: epoch {place.epoch + 1} goes on after step {self.place.step}")

    def _on_these_ranks(self, place: Place, here: Place) -> Place:
        """The same place, counted in this run's optimizer steps where epochs are what was asked for."""
        step, run, order = place.step, SESSION.run, self._order()
        if (place.world_size, place.accumulation) != (here.world_size, here.accumulation):
            if run is not None and getattr(run.args, "max_train_epochs", None):
                each = -(-len(order) // here.world_size // here.accumulation)
                step = place.epoch * each + place.items // here.world_size // here.accumulation
        return replace(place, step=step, world_size=here.world_size, accumulation=here.accumulation)

    def align(self, accelerator: Accelerator, said: Mapping[str, Any]) -> None:
        """After accelerate has loaded a state: accumulation begins anew, as after every optimizer step, and
        the learning rate is that of the step where its scheduler, which every rank advances, counted other
        ranks."""
        accelerator.step = 0
        place = self._place()
        count = place.step * place.world_size
        if count == said["step"] * said["world_size"]:
            return
        for wrapped in accelerator._schedulers:
            scheduler = getattr(wrapped, "scheduler", wrapped)
            if isinstance(scheduler, LambdaLR):
                scheduler.last_epoch = count - 1
                scheduler.step()
            else:
                warn(
                    f"the state was saved on {said['world_size']} process(es), and "
                    f"{type(scheduler).__name__} goes on as if these were as many: its learning rate is of "
                    "another step"
                )

    def _place(self) -> Place:
        if self.place is None:
            raise FixError(
                "--exact_resume: this sd-scripts did not prepare its training data as we know it, so its "
                "order is not known: leave the flag out"
            )
        return self.place

    def _order(self) -> Order:
        self._place()
        assert self.order is not None
        return self.order


RESUME = Resume()


def prepare_data_loader(
    original: Callable[..., Any], self: Accelerator, data_loader: Any, *args: Any, **kwargs: Any
) -> Any:
    """The training data's loader with the order of ours; the validation's, which is not shuffled, stays."""
    run = SESSION.on("resume")
    if run is None or not isinstance(getattr(data_loader, "sampler", None), RandomSampler):
        return original(self, data_loader, *args, **kwargs)
    group, seed = data_loader.dataset, int(run.args.seed)
    accumulation = int(getattr(run.args, "gradient_accumulation_steps", None) or 1)
    RESUME.order = Order(len(group), seed, self.num_processes, accumulation)
    RESUME.place = Place(0, 0, 0, seed, fingerprint(group), self.num_processes, accumulation)
    kept = ("collate_fn", "num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    made = DataLoader(
        Ordered(group), sampler=RESUME.order, **{name: getattr(data_loader, name) for name in kept}
    )
    return original(self, made, *args, **kwargs)


def backward(
    original: Callable[..., Any], self: Accelerator, loss: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """A step's loss is known, which a state within that step says."""
    RESUME.loss = loss.detach()
    return original(self, loss, *args, **kwargs)


def fingerprint(group: Any) -> str:
    """16 hex digits of what the data sets deal: seeds, batch sizes and buckets of images by file name."""
    digest = hashlib.blake2b(digest_size=8)
    for dataset in group.datasets:
        digest.update(f"{dataset.seed} {dataset.batch_size} {len(dataset)}|".encode())
        for info in dataset.image_data.values():
            name = os.path.basename(info.absolute_path)
            digest.update(f"{name} {info.num_repeats} {info.bucket_reso}|".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def sampled(
    original: Callable[..., Any],
    pipe_class: Any,
    accelerator: Any,
    args: argparse.Namespace,
    epoch: int | None,
    steps: int,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Previews; those "at first", of epoch 0, are of the run's beginning alone."""
    if SESSION.on("resume") and epoch == 0 and steps > 0:
        return None
    return original(pipe_class, accelerator, args, epoch, steps, *rest, **kwargs)


# ---------------------------------------------------------------------- the loop


def _edit(function: ast.FunctionDef) -> dict[str, int]:
    """Let the loop ask; returns how often each of what is needed was there."""
    counts = dict.fromkeys(
        ("global_step = 0", "progress_bar = tqdm(...)", "loss_recorder = ...", "for epoch in range(...)",
         "for step, batch in enumerate(... train_dataloader)"), 0
    )  # fmt: skip
    first = f"{_HERE}.first(args)"
    for node in ast.walk(function):
        text = ast.unparse(node) if isinstance(node, ast.Assign) else ""
        if text in ("global_step = 0", "initial_step = steps_from_state"):
            node.value = expression(first)  # type: ignore[attr-defined]
        elif text.startswith("progress_bar = tqdm("):
            text = "progress_bar = tqdm(...)"
            node.value.keywords.append(ast.keyword("initial", expression(first)))  # type: ignore[attr-defined]
        elif text.startswith("loss_recorder = "):
            text = "loss_recorder = ..."
            node.value = call(_HERE, "recorder", node.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.For):
            head = f"for {ast.unparse(node.target).strip('()')} in {ast.unparse(node.iter)}"
            if head.startswith("for epoch in range("):
                text = "for epoch in range(...)"
                node.iter = expression(f"{_HERE}.epochs(args)")
            elif head.startswith("for step, batch in enumerate(") and head.endswith("train_dataloader)"):
                text = "for step, batch in enumerate(... train_dataloader)"
                node.iter = call(_HERE, "batches", node.iter.args[0])  # type: ignore[attr-defined]
            else:
                continue
        else:
            continue
        counts[text] = counts.get(text, 0) + 1
    if function.args.args[0].arg == "self":  # its own count of steps, from kohya's file in the state
        counts.setdefault("initial_step = steps_from_state", 0)
    return counts


EDIT = Edit("--exact_resume", RESUME, _HERE, _edit, ", which resumes upstream's way", "count from 0")
