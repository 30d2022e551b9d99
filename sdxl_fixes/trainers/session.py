"""What a trainer's patches share within the process, and the guard that no fix is ever silently off.

The guard does not stand in the trainer's code, which moves, but in accelerate's backward pass and in torch's
optimizers, which no training goes round: if training begins and no run was started, if a fix that is on has
not done its work, or if a patched function was called before the run began, training stops there with one
sentence.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.command_line import Flag, add_flags, underscored
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.log import rank, stop
from sdxl_fixes.trainers.fixes import Fix
from sdxl_fixes.trainers.patching import Patch, PatchSet
from sdxl_fixes.trainers.report import sampling_flags
from sdxl_fixes.trainers.run import Run
from sdxl_fixes.trainers.source import belongs
from sdxl_fixes.trainers.step import StepState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Session:
    """The patch set, the run once its arguments are known, and what passes between patches within a step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launched = False  # by the launcher: then this process is a training for certain
        self._hook: RemovableHandle | None = None
        self.reset()

    def reset(self) -> None:
        """No patches, no run."""
        self.patches = PatchSet(())
        self.run: Run | None = None
        self.step = StepState()
        self._seen: set[str] = set()  # marks seen since the run began
        self._early: dict[str, Patch] = {}
        self._guarded = False

    def begin(self, run: Run) -> None:
        """The arguments are known, nothing is loaded yet."""
        self.run, self.step, self._seen, self._guarded = run, StepState(), set(), False

    def on(self, fix: str) -> Run | None:
        """The run if ``fix`` is switched on in it, else None."""
        return self.run if self.run is not None and fix in self.run.on else None

    def reached(self, mark: str) -> None:
        """A fix (or a part of one, by its name) has done its work."""
        self.step.reached.add(mark)
        self._seen.add(mark)

    def has_reached(self, mark: str) -> bool:
        """Whether it ever has."""
        return mark in self._seen

    @property
    def trained(self) -> bool:
        """Whether a training step was seen."""
        return self._guarded

    def called(self, patch: Patch) -> None:
        """A replaced function is being called: for :class:`PatchSet`."""
        if self.run is None and "run" not in patch.fixes:
            self._early.setdefault(patch.path, patch)

    def backward(
        self, original: Callable[..., Any], accelerator: Accelerator, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of accelerate's: by now every fix that is on must have done its work in this step."""
        self._guarded = True
        self.check()
        self.step = StepState()  # before, so that nothing here keeps the graph
        result = original(accelerator, *args, **kwargs)
        if (
            self.run is not None
            and self.run.timesteps is not None
            and getattr(accelerator, "sync_gradients", True)
        ):
            self.run.timesteps.end_of_step()
        return result

    def watch_optimizers(self) -> None:
        """Guard the first optimizer step of a training that does not go through accelerate's backward pass,
        too."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._hook = register_optimizer_step_pre_hook(self._stepping)

    def unwatch(self) -> None:
        """Undo :meth:`watch_optimizers`."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _stepping(self, optimizer: Optimizer, *_: Any) -> None:
        if self._guarded:
            return
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        # else a step to allocate state
        if any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters):
            self.check()
            self._guarded = self.run is not None

    def check(self) -> None:
        """Raise FixError if a training step got here without the fixes that it was asked for."""
        run = self.run
        if run is None:
            if self.launched or self._training():
                raise FixError(
                    f"training begins, and this {self.name} has not shown its arguments where we look for "
                    "them, so no fix is on: nothing was trained. It may be newer than this plugin: update "
                    f"sdxl-fixes, or start the script without it ({self._look()})"
                )
            return
        early = (
            [path for path, patch in self._early.items() if run.on & set(patch.fixes)] if self._early else []
        )
        if early:
            raise FixError(
                f"{', '.join(early)} was called before this {self.name} showed its arguments, so it ran "
                "without your fixes: "
                f"leave out the flags of {', '.join(sorted(run.on & set(self._early[early[0]].fixes)))} "
                f"({self._look()})"
            )
        missed = sorted((run.due["step"] - self.step.reached) | (run.due["start"] - self._seen))
        if missed:
            fixes = sorted({fix for mark in missed for fix in run.fixes_of(mark)})
            parts = [mark for mark in missed if mark not in fixes]
            raise FixError(
                f"{', '.join(fixes)} asked for but not reached in this training step: this {self.name} does "
                "not call what we patch"
                f"{' (' + ', '.join(parts) + ')' if parts else ''}, or calls backward twice a step; leave "
                "out its flags or give "
                f"--fixes all,{','.join('-' + fix for fix in fixes)} ({self._look()})"
            )

    def _training(self) -> bool:
        """Whether a script of the trainer is running: one is on the stack."""
        return self.patches.root is None or bool(self._scripts())

    def _scripts(self) -> list[str]:
        """Scripts in the trainer's folder that are on the stack, outermost last."""
        root, frame, found = self.patches.root, sys._getframe(1), []
        while frame is not None:
            file = frame.f_code.co_filename
            if (
                root is not None
                and file.endswith(".py")
                and belongs(file, str(root))
                and Path(file).resolve().parent == root
            ):
                found.append(file)
            frame = frame.f_back  # type: ignore[assignment]
        return found

    def script_name(self) -> str | None:
        """File name of the trainer's script that is running; None where no script of its folder is on the
        stack."""
        scripts = self._scripts()
        return Path(scripts[-1]).name if scripts else None

    def _look(self) -> str:
        return f"sdxl-fixes doctor {next(iter(reversed(self._scripts())), 'SCRIPT')} tells more"


def help_text(usage: str, ours: Mapping[str, Flag], fixes: Mapping[str, Fix]) -> str:
    """What ``--help`` of a launcher shows: our flags, and the names of the trainer's own that fixes serve."""
    named = dict.fromkeys(
        flag for fix in fixes.values() for flag in (*fix.flags, *fix.needs, *fix.options) if flag not in ours
    )
    served = f"flags of the trainer's own that fixes serve: {', '.join(f'--{name}' for name in named)}"
    parser = argparse.ArgumentParser(
        usage=usage.removeprefix("usage: "), add_help=False, epilog=served if named else None
    )
    add_flags(parser, ours)
    return parser.format_help()


def run_script(
    script: Path, install: Callable[[], None], session: Session, flags: Collection[str] = ()
) -> None:
    """Run an unmodified training script, whose path is the first argument of this process, with the adapter's
    patches installed; ``flags`` are those of ours, which may be written with hyphens. What the user can put
    right ends the process with one sentence."""
    sys.path.insert(0, str(script.resolve().parent))  # what python itself does for a script; runpy does not
    sys.argv = underscored(sys.argv[1:], {f"--{name}" for name in flags})
    try:
        install()
        session.launched = True
        runpy.run_path(str(script), run_name="__main__")
    except FlagError as error:
        stop(str(error), 2)  # argparse's own status for wrong flags
    except FixError as error:
        sys.exit(f"sdxl-fixes: {error}")
    finally:
        session.launched = False
    if not session.trained:  # no data, or the script was asked for something else, which it says
        return
    if session.on("ema") is not None and rank() == 0 and not session.has_reached("ema"):
        sys.exit(
            "sdxl-fixes: the training is done, but --ema_decay saved no average: its script saves no model"
        )
    run = session.on("saving")
    if run is not None and rank() == 0 and not session.has_reached("saving"):
        said = sampling_flags(Sampling(run.schedule, run.prediction_type))
        words = said or f"--prediction_type {run.prediction_type}"
        sys.exit(
            "sdxl-fixes: the training is done, but no model file that was saved carries its schedule: "
            f"sdxl-fixes stamp FILE {words} writes it"
        )
