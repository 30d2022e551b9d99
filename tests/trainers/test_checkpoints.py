"""Checkpoint folders that are there as a whole or not at all."""

import os
import shutil

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


@pytest.mark.skipif(os.name == "nt", reason="opens no folder")
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_before_others_go(
    tmp_path, accelerator, monkeypatch
):
    """By the order of the system's calls: a power cut keeps what was synced, and any of the rest."""
    with checkpoint(tmp_path, 1, accelerator, keep=1):
        pass
    calls, names, part = [], {}, tmp_path / "checkpoint.part"

    def recorded(name, original, said):
        def call(*given, **options):
            found = original(*given, **options)
            calls.append((name, *said(found, *given)))
            return found

        return call

    def opened(path, *rest, original=os.open, **options):
        names[found := original(path, *rest, **options)] = os.fspath(path)
        return found

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync, lambda _, file: (names[file],)))
    monkeypatch.setattr(os, "rename", recorded("rename", os.rename, lambda _, a, b: (str(a), str(b))))
    monkeypatch.setattr(
        shutil, "rmtree", recorded("remove", shutil.rmtree, lambda _, path, **__: (str(path),))
    )
    with checkpoint(tmp_path, 2, accelerator, keep=1) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("")
        (folder / "state").write_text("")
    order = [calls.index(("rename", str(part), str(tmp_path / "checkpoint-2")))]
    for path in (part / "model" / "weights", part / "state", part / "model", part):
        assert calls.index(("sync", str(path))) < order[0]
    order.append(calls.index(("sync", str(tmp_path))))
    order.append(calls.index(("rename", *(str(tmp_path / n) for n in ("checkpoint-1", "checkpoint-1.part")))))
    assert order == sorted(order) and calls[-1] == ("remove", str(tmp_path / "checkpoint-1.part"))


def test_what_nfs_keeps_of_open_files_is_in_nobodys_way(tmp_path, accelerator, monkeypatch):
    original = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        for file in path.rglob("*"):
            if file.is_file() and not file.name.startswith(".nfs"):
                file.unlink()
        if not any(path.rglob("*")):
            original(path)

    def begun(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".nfs0001").write_text("")
        (tmp_path / name / "state").write_text("half")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    begun("checkpoint.part"), begun("checkpoint-1"), begun("checkpoint-2"), begun("checkpoint-0.part")
    for number in (3, 4):
        with checkpoint(tmp_path, number, accelerator, keep=1) as folder:
            assert not (folder / "state").exists()
        assert names(tmp_path) == [f"checkpoint-{number}"]


def test_what_cannot_be_removed_is_told(tmp_path, accelerator, monkeypatch):
    (tmp_path / "checkpoint.part").mkdir()
    (tmp_path / "checkpoint.part" / "state").write_text("of another checkpoint")

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path / "state"))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(PermissionError), checkpoint(tmp_path, 1, accelerator, keep=1):
        pass
