"""What a run with --stable_loss_steps printed and logged, read for tests."""

import re

import pytest


def printed(process):
    """step -> (loss, unweighted loss, images)."""
    found = re.findall(
        r"sdxl-fixes: step (\d+): stable loss (\S+), unweighted (\S+) \((\d+) images x 10", process.stderr
    )
    return {int(step): (float(loss), float(plain), int(images)) for step, loss, plain, images in found}


def logged(folder):
    """tag -> {step: value}, as tensorboard reads it."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found
