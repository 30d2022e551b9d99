"""The folders that accelerate saves a training's state into: the schedule, the flags that shape the loss, and
the place in the stratified timesteps, in a file of its own, since accelerate refuses states with another
number of registered objects, and these go from and to trainers without the fixes.

The file is written last and removed first, so that a state whose writing was cut off has none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import FixError, printable
from sdxl_fixes.flags import FLAGS, grouped
from sdxl_fixes.log import warn
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.run import Run
from sdxl_fixes.trainers.session import Session

RECORD = "sdxl_fixes.json"
# the schedule is compared by itself, and validation changes no training
SHAPING = tuple(grouped("loss", "weighting", "noise", "timesteps", "keep"))


class Exact(Protocol):
    """What goes on at the very place that a state was saved at."""

    def load(self, folder: str, said: Mapping[str, Any]) -> None:
        """Take the place, before the state is loaded. Raises FixError where it cannot be gone on from."""

    def align(self, accelerator: Any, said: Mapping[str, Any]) -> None:
        """What the loaded state does not put right itself."""


def save_state(
    session: Session,
    original: Callable[..., Any],
    accelerator: Any,
    folder: str | None,
    *args: Any,
    place: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """In the place of accelerate's: the state, and ours beside it; ``place`` is of a training that can go on
    exactly."""
    run = session.run
    ours = run if run is not None and run.on and folder is not None else None
    if ours is not None:
        (Path(str(folder)) / RECORD).unlink(missing_ok=True)
    result = original(accelerator, folder, *args, **kwargs)
    if ours is not None:
        if ours.ema is not None:
            ours.ema.save(str(folder))
        state = {
            "schedule": ours.schedule.to_record(),
            "prediction_type": ours.prediction_type,
            "flags": _shaping(ours),
            "timesteps": None if ours.timesteps is None else ours.timesteps.state_dict(),
            "place": place,
        }
        with replacing(Path(str(folder)) / RECORD) as file:
            file.write_text(json.dumps(state), encoding="utf-8")
    return result


def load_state(
    session: Session,
    original: Callable[..., Any],
    accelerator: Any,
    folder: str | None,
    *args: Any,
    exact: Exact | None = None,
    **kwargs: Any,
) -> Any:
    """Resume, if the state was trained on the schedule of this run, and for ``exact`` with its flags. Raises
    FixError otherwise."""
    run, file, place = session.run, Path(folder or "") / RECORD, None
    if exact is not None and not file.is_file():
        raise FixError(
            f"--exact_resume: {folder} holds no {RECORD}, so its writing was cut off, or it is a state of a "
            "training without the fixes: resume from another state, or leave the flag out"
        )
    if run is not None and folder is not None and file.is_file():
        trained, prediction_type, flags, timesteps, place = _read(file)
        if run.on and (trained, prediction_type) != (run.schedule, run.prediction_type):
            raise FixError(
                f"{folder} was trained with {prediction_type} on {trained!r}, and the flags of "
                "this run describe "
                f"{run.prediction_type} on {run.schedule!r}: resume with the flags that it was started with"
            )
        if run.on:
            _compare(folder, flags, _shaping(run), exact is not None)
        if exact is not None:
            if place is None:
                raise FixError(
                    f"--exact_resume: {folder} was saved without the flag, so its place in the data is not "
                    "known: leave the flag out"
                )
            with _one_sentence(file):
                exact.load(folder, place)
        if run.timesteps is not None and timesteps is not None:
            with _one_sentence(file):
                run.timesteps.load_state_dict(timesteps)
    if run is not None and run.ema is not None and folder is not None:
        run.ema.load(folder)
    result = original(accelerator, folder, *args, **kwargs)
    if exact is not None and place is not None:
        exact.align(accelerator, place)
    return result


def _shaping(run: Run) -> dict[str, str]:
    """The flags that shape the loss and are not at their default, as words."""
    values = {name: getattr(run.flags, name) for name in SHAPING}
    return {name: str(value) for name, value in values.items() if value != FLAGS[name].default}


def _compare(folder: str, before: Mapping[str, str], now: Mapping[str, str], exact: bool) -> None:
    """Say what the state was trained with otherwise. Raises FixError if it must not differ."""
    names = [name for name in SHAPING if before.get(name) != now.get(name)]
    if not names:
        return
    was, is_ = (", ".join(_words(name, said.get(name)) for name in names) for said in (before, now))
    sentence = f"{folder} was trained with {was}, and this run is with {is_}"
    if exact:
        raise FixError(f"{sentence}: --exact_resume needs the same, without it training goes on with the new")
    warn(f"{sentence}: training goes on with the new")


def _words(name: str, value: str | None) -> str:
    if value is None:
        return f"no --{name}"
    return f"--{name}" if FLAGS[name].kind is bool else f"--{name} {value}"


def _read(file: Path) -> tuple[NoiseSchedule, str, dict[str, str], dict[str, Any] | None, Any]:
    """Schedule, prediction type, flags, place in the timesteps, place in the training."""
    with _one_sentence(file):
        state = json.loads(file.read_text(encoding="utf-8"))
        flags = {str(name): str(value) for name, value in dict(state["flags"]).items()}
        schedule = NoiseSchedule.from_record(state["schedule"])
        return schedule, state["prediction_type"], flags, state["timesteps"], state["place"]


@contextlib.contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """What ``file`` holds and cannot be is a FixError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RecursionError, ArithmeticError) as error:
        why = printable(str(error))[:300] if isinstance(error, OSError | ValueError) else "of another form"
        raise FixError(f"cannot resume from {file} ({why}): resume from another state") from error
