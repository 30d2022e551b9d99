"""The folders that accelerate saves a training's state into: the schedule and the place in the stratified
timesteps, in a file of its own, since accelerate refuses states with another number of registered objects,
and these go from and to trainers without the fixes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import FixError, printable
from sdxl_fixes.schedule import NoiseSchedule
from sdxl_fixes.trainers.session import Session

RECORD = "sdxl_fixes.json"


def save_state(
    session: Session,
    original: Callable[..., Any],
    accelerator: Any,
    folder: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In the place of accelerate's: the state, and ours beside it."""
    result = original(accelerator, folder, *args, **kwargs)
    run = session.run
    if run is not None and run.on and folder is not None:
        state = {
            "schedule": run.schedule.to_record(),
            "prediction_type": run.prediction_type,
            "timesteps": None if run.timesteps is None else run.timesteps.state_dict(),
        }
        with replacing(Path(folder) / RECORD) as file:
            file.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        if run.ema is not None:
            run.ema.save(folder)
    return result


def load_state(
    session: Session,
    original: Callable[..., Any],
    accelerator: Any,
    folder: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Resume, if the state was trained on the schedule of this run. Raises FixError otherwise."""
    run, file = session.run, Path(folder or "") / RECORD
    if run is not None and folder is not None and file.is_file():
        trained, prediction_type, timesteps = _read(file)
        if run.on and (trained, prediction_type) != (run.schedule, run.prediction_type):
            raise FixError(
                f"{folder} was trained with {prediction_type} on {trained!r}, and the flags of "
                "this run describe "
                f"{run.prediction_type} on {run.schedule!r}: resume with the flags that it was started with"
            )
        if run.timesteps is not None and timesteps is not None:
            with _one_sentence(file):
                run.timesteps.load_state_dict(timesteps)
    if run is not None and run.ema is not None and folder is not None:
        run.ema.load(folder)
    return original(accelerator, folder, *args, **kwargs)


def _read(file: Path) -> tuple[NoiseSchedule, str, dict[str, Any] | None]:
    """Schedule, prediction type and place in the timesteps."""
    with _one_sentence(file):
        state = json.loads(file.read_text(encoding="utf-8"))
        return NoiseSchedule.from_record(state["schedule"]), state["prediction_type"], state["timesteps"]


@contextlib.contextmanager
def _one_sentence(file: Path) -> Iterator[None]:
    """What ``file`` holds and cannot be is a FixError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RecursionError, ArithmeticError) as error:
        why = printable(str(error))[:300] if isinstance(error, OSError | ValueError) else "of another form"
        raise FixError(f"cannot resume from {file} ({why}): resume from another state") from error
