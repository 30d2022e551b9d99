"""Checkpoint folders that are there as a whole or not at all."""

import pytest
from accelerate import Accelerator

from sdxl_fixes.trainers.checkpoints import checkpoint, checkpoints


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def names(folder):
    return [path.name for path in checkpoints(folder)]


def test_the_last_ones_stay_in_order_of_their_numbers(tmp_path, accelerator):
    for number in (8, 9, 10, 100):
        with checkpoint(tmp_path, number, accelerator, keep=3) as folder:
            (folder / "state").write_text(str(number))
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [(path / "state").read_text() for path in checkpoints(tmp_path)] == ["9", "10", "100"]
    assert {path.name for path in tmp_path.iterdir()} == {*names(tmp_path)}


def test_what_was_cut_off_is_no_checkpoint_and_leaves_nothing_to_the_next(tmp_path, accelerator):
    with pytest.raises(KeyboardInterrupt), checkpoint(tmp_path, 1, accelerator, keep=1) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    (tmp_path / "checkpoint-x").mkdir()
    with checkpoint(tmp_path, 2, accelerator, keep=1) as folder:
        (folder / "whole").write_text("")
    assert names(tmp_path) == ["checkpoint-2"]
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["whole"]
