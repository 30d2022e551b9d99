"""Patches are applied only to the shape they know, and undone exactly."""

import inspect
import re
import sys
import types

import pytest

from sdxl_fixes.trainers.patching import Patch, PatchSet, check_source


@pytest.fixture
def trainer():
    """A module with a function, a class, and a child that inherits."""
    module = types.ModuleType("some_trainer")

    def weigh(loss, timesteps):
        return loss + timesteps

    class Recorder:
        def add(self, value):
            return value

    class Child(Recorder):
        pass

    module.weigh, module.Recorder, module.Child = weigh, Recorder, Child
    sys.modules["some_trainer"] = module
    yield module
    del sys.modules["some_trainer"]


def doubled(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


WEIGH = Patch("weights", "some_trainer:weigh", ("loss", "timesteps"), doubled, "doubles")
ADD = Patch("recorder", "some_trainer:Recorder.add", ("self", "value"), doubled, "doubles")
INHERITED = Patch("recorder", "some_trainer:Child.add", ("self",), doubled, "doubles")


def test_a_patch_replaces_and_undoing_restores_the_very_objects(trainer):
    before = {"weigh": trainer.weigh, "add": vars(trainer.Recorder)["add"]}
    patches = PatchSet((WEIGH, ADD, INHERITED))
    patches.apply()
    assert trainer.weigh(1, 2) == 6 and trainer.Recorder().add(5) == 10 and trainer.Child().add(5) == 20
    patches.undo()
    assert trainer.weigh is before["weigh"] and vars(trainer.Recorder)["add"] is before["add"] and "add" not in vars(trainer.Child)


def test_applying_twice_is_the_same_as_once(trainer):
    original = trainer.weigh
    patches = PatchSet((WEIGH,))
    patches.apply()
    patches.apply()
    assert trainer.weigh(1, 2) == 6
    patches.undo()
    assert trainer.weigh is original


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (Patch("weights", "some_trainer:weigh", ("loss", "t"), doubled, ""), r"expected parameters \(loss, t\), found \(loss, timesteps\)"),
        (Patch("weights", "some_trainer:gone", ("loss",), doubled, ""), r"some_trainer:gone: expected a function .* found none"),
        (Patch("weights", "no_such_trainer:weigh", ("loss",), doubled, ""), r"no_such_trainer:weigh: expected a function"),
        (Patch("weights", "some_trainer:__doc__", ("loss",), doubled, ""), r"found none"),
    ],
)
def test_an_unknown_shape_refuses_the_whole_fix_and_leaves_the_others(trainer, patch, words):
    original = trainer.weigh
    patches = PatchSet((WEIGH, patch, ADD))
    patches.apply()
    assert trainer.weigh is original and trainer.Recorder().add(5) == 10
    assert list(patches.refused) == ["weights"] and re.search(words, patches.refused["weights"])
    patches.undo()


def test_only_chosen_fixes_are_applied(trainer):
    original = trainer.weigh
    patches = PatchSet((WEIGH, ADD))
    patches.apply({"recorder"})
    assert trainer.weigh is original and trainer.Recorder().add(5) == 10
    patches.undo()


def test_undo_refuses_when_somebody_else_patched_on_top(trainer):
    patches = PatchSet((WEIGH,))
    patches.apply()
    ours, trainer.weigh = trainer.weigh, lambda loss, timesteps: 0
    with pytest.raises(RuntimeError, match="replaced again by somebody else"):
        patches.undo()
    trainer.weigh = ours
    patches.undo()
    assert trainer.weigh(1, 2) == 3


def test_a_replacement_keeps_the_original_name_and_signature(trainer):
    patches = PatchSet((WEIGH,))
    patches.apply()
    assert trainer.weigh.__name__ == "weigh" and list(inspect.signature(trainer.weigh).parameters) == ["loss", "timesteps"]
    patches.undo()


def test_a_classmethod_keeps_its_class_and_a_builtin_needs_no_names(trainer):
    class Loader:
        @classmethod
        def load(cls, path):
            return cls.__name__, path

    class Child(Loader):
        pass

    trainer.Loader, trainer.Child, trainer.largest = Loader, Child, max  # max tells no parameters
    before = vars(Loader)["load"]

    def named(original, cls, path):
        return (*original(cls, path), cls.__name__)

    loads = Patch("load", "some_trainer:Loader.load", ("path",), named, "")
    patches = PatchSet((loads, Patch("builtin", "some_trainer:largest", (), doubled, "")))
    patches.apply()
    assert trainer.Child.load("x") == ("Child", "x", "Child") and trainer.largest(1, 2) == 4 and not patches.refused
    patches.undo()
    assert vars(Loader)["load"] is before and trainer.largest is max and trainer.Child.load("x") == ("Child", "x")


def test_source_is_checked_without_importing_it(tmp_path):
    package = tmp_path / "library"
    package.mkdir()
    (package / "util.py").write_text(
        "raise SystemExit('imported')\n"
        "from safetensors.torch import save_file\n"
        "def weigh(loss, timesteps, gamma=1): pass\n"
        "class Recorder:\n    def add(self, *, value): pass\n"
    )

    def check(target, *parameters, exact=False, module="library.util"):
        return check_source(Patch("fix", f"{module}:{target}", parameters, doubled, "", exact), tmp_path)

    assert check("weigh", "loss", "timesteps") is check("Recorder.add", "self", "value") is check("save_file", "tensors") is None
    assert "found (loss, timesteps, gamma)" in check("weigh", "loss", "timesteps", exact=True)
    assert "expected parameters (loss, t)" in check("weigh", "loss", "t")
    assert "found none" in check("gone", "loss") and "found none" in check("Recorder.gone", "self")
    assert "there is no" in check("weigh", "loss", module="library.gone")
