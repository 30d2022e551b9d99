"""Patches are applied only to the shape they know, wherever a function went, and undone exactly."""

import importlib
import inspect
import re
import sys
import types

import pytest

from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.patching import Patch, PatchSet, check_source
from sdxl_fixes.trainers.source import defining


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


def tripled(original, *args, **kwargs):
    return 3 * original(*args, **kwargs)


WEIGH = Patch(("weights",), "some_trainer:weigh", ("loss", "timesteps"), doubled, "doubles")
ADD = Patch(("recorder",), "some_trainer:Recorder.add", ("self", "value"), doubled, "doubles")
INHERITED = Patch(("recorder",), "some_trainer:Child.add", ("self",), doubled, "doubles")


def test_a_patch_replaces_and_undoing_restores_the_very_objects(trainer):
    before = {"weigh": trainer.weigh, "add": vars(trainer.Recorder)["add"]}
    patches = PatchSet((WEIGH, ADD, INHERITED))
    patches.apply()
    assert trainer.weigh(1, 2) == 6 and trainer.Recorder().add(5) == 10 and trainer.Child().add(5) == 20
    patches.undo()
    assert (
        trainer.weigh is before["weigh"]
        and vars(trainer.Recorder)["add"] is before["add"]
        and "add" not in vars(trainer.Child)
    )


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
        (
            Patch(("weights",), "some_trainer:weigh", ("loss", "t"), tripled, ""),
            r"expected parameters \(loss, t\), found \(loss, timesteps\)",
        ),
        (
            Patch(("weights",), "some_trainer:gone", ("loss",), tripled, ""),
            r"^gone: expected a function .* found none \(module .some_trainer. has no attribute .gone.\)",
        ),
        (
            Patch(("weights",), "no_such_trainer:weigh", ("loss",), tripled, ""),
            r"^weigh: expected a function .* found none \(No module named .no_such_trainer.\)",
        ),
        (Patch(("weights",), "some_trainer:__doc__", ("loss",), tripled, ""), r"found none"),
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
    with pytest.raises(FixError, match="replaced again by somebody else"):
        patches.undo()
    trainer.weigh = ours
    patches.undo()
    assert trainer.weigh(1, 2) == 3


def test_a_replacement_keeps_the_original_name_and_signature(trainer):
    patches = PatchSet((WEIGH,))
    patches.apply()
    assert trainer.weigh.__name__ == "weigh" and list(inspect.signature(trainer.weigh).parameters) == [
        "loss",
        "timesteps",
    ]
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

    loads = Patch(("load",), "some_trainer:Loader.load", ("path",), named, "")
    patches = PatchSet((loads, Patch(("builtin",), "some_trainer:largest", (), doubled, "")))
    patches.apply()
    assert (
        trainer.Child.load("x") == ("Child", "x", "Child")
        and trainer.largest(1, 2) == 4
        and not patches.refused
    )
    patches.undo()
    assert (
        vars(Loader)["load"] is before
        and trainer.largest is max
        and trainer.Child.load("x") == ("Child", "x")
    )


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
        return check_source(Patch(("fix",), f"{module}:{target}", parameters, doubled, "", exact), tmp_path)

    assert (
        check("weigh", "loss", "timesteps")
        is check("Recorder.add", "self", "value")
        is check("save_file", "tensors")
        is None
    )
    assert "found (loss, timesteps, gamma)" in check("weigh", "loss", "timesteps", exact=True)
    assert "expected parameters (loss, t)" in check("weigh", "loss", "t")
    assert "found none" in check("gone", "loss") and "found none" in check("Recorder.gone", "self")
    assert check("weigh", "loss", module="library.gone") is None  # it is found where it went
    assert "expected parameters (loss, t)" in check("weigh", "loss", "t", module="library.gone")
    looked = f"found none (looked in library.gone and all of {tmp_path.name})"
    assert looked in check("gone", "loss", module="library.gone")
    assert check("weigh", "t", module="accelerate.utils") is None  # a library: seen at import


def test_two_rows_of_one_target_and_replacement_are_refused():
    again = Patch(("recorder",), WEIGH.target, WEIGH.parameters, doubled, "for another fix")
    with pytest.raises(ValueError, match="some_trainer:weigh has two rows with one replacement"):
        PatchSet((WEIGH, ADD, again))


def test_two_replacements_of_one_target_do_both_their_work_and_are_undone(trainer):
    original = trainer.weigh
    patches = PatchSet((WEIGH, Patch(("recorder",), WEIGH.target, WEIGH.parameters, tripled, "")))
    patches.apply()
    assert trainer.weigh(1, 2) == 18
    patches.undo()
    assert trainer.weigh is original


def test_one_fix_of_a_patch_is_enough_to_apply_it_and_every_one_of_them_is_refused(trainer):
    both = Patch(("weights", "recorder"), "some_trainer:weigh", ("loss",), doubled, "")
    patches = PatchSet((both,))
    patches.apply({"recorder", "another"})
    assert trainer.weigh(1, 2) == 6
    patches.apply({"another"})
    assert trainer.weigh(1, 2) == 3 and not patches.applied
    unfit = PatchSet((both, Patch(("recorder", "other"), "some_trainer:gone", (), tripled, ""), ADD))
    unfit.apply()  # weights still fits; recorder is refused whole, so ADD is not applied
    assert trainer.weigh(1, 2) == 6 and trainer.Recorder().add(5) == 5
    assert set(unfit.refused) == {"recorder", "other"}
    unfit.undo()


def test_calls_are_told_before_the_replacement_runs(trainer):
    told = []
    patches = PatchSet((WEIGH, ADD), calls=told.append)
    patches.apply()
    assert not told
    trainer.weigh(1, 2), trainer.Recorder().add(1)
    assert told == [WEIGH, ADD]
    patches.undo()
    trainer.weigh(1, 2)
    assert told == [WEIGH, ADD]


# ---------------------------------------------------------------- a function that moved


FILES = {
    "moving/__init__.py": "",
    "moving/loss.py": "def weigh(loss, timesteps):\n    return loss + timesteps\n",
    "moving/train_util.py": "from moving.loss import weigh\n",
    "moving/other.py": "import moving.loss as u\nfrom moving.loss import weigh as renamed\nkept = "
    "[renamed]\n",
    "moving_script.py": "from moving.other import renamed as third\n",
}
USES = "from moving.loss import weigh\ntaken = weigh\n"
FOREIGN = {"lib/site-packages/moving_guest.py": USES, "../moving_outside.py": USES}


def moving(homes, replacement=doubled, parameters=("loss", "timesteps"), fix="weights"):
    """A patch of the function that moved."""
    return Patch((fix,), f"{homes}:weigh", parameters, replacement, "")


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A trainer's folder, where weigh lives in moving.loss; its modules, and two that are not its own."""
    root = tmp_path / "trainer"
    for name, text in {**FILES, **FOREIGN}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in (root, tmp_path, root / "lib" / "site-packages"):
        monkeypatch.syspath_prepend(str(folder))
    names = ("moving.loss", "moving.train_util", "moving.other", "moving_script")
    names += ("moving_outside", "moving_guest")
    yield root.resolve(), [importlib.import_module(name) for name in names]
    for name in [name for name in sys.modules if name.startswith("moving")]:
        del sys.modules[name]


HOMES = {
    "the old home": "moving.train_util",
    "both, newest first": "moving.loss|moving.train_util",
    "both, one not there": "moving.newer|moving.train_util",
    "none that is known": "moving.gone|elsewhere",
}


@pytest.mark.parametrize("homes", HOMES.values(), ids=HOMES)
def test_a_function_that_moved_is_replaced_where_it_is_defined_and_wherever_it_is_held(moved, homes):
    root, (loss, util, other, script, outside, guest) = moved
    original = loss.weigh
    patches = PatchSet((moving(homes),), root)
    patches.apply()
    held = [loss.weigh, util.weigh, other.renamed, script.third]
    assert not patches.refused and [function(1, 2) for function in held] == [6] * 4
    assert len(set(map(id, held))) == 1 and other.u is loss
    assert other.kept == [original]  # only names of modules: what is inside a value is the trainer's
    for foreign in (outside, guest):  # outside of the trainer's folder, and in an environment inside of it
        assert foreign.weigh is foreign.taken is original
    patches.undo()
    assert all(function is original for function in (loss.weigh, util.weigh, other.renamed, script.third))
    assert not patches.applied


def test_two_replacements_of_a_function_that_moved_are_both_undone_everywhere(moved):
    root, (loss, util, other, script, *_) = moved
    original = loss.weigh
    patches = PatchSet((moving("moving.train_util"), moving("moving.loss", tripled, fix="other")), root)
    patches.apply()
    assert [function(1, 2) for function in (loss.weigh, util.weigh, other.renamed, script.third)] == [18] * 4
    patches.undo()
    assert all(function is original for function in (loss.weigh, util.weigh, other.renamed, script.third))


def test_a_module_that_is_imported_after_the_patch_gets_the_replacement_too(moved):
    root, _ = moved
    patches = PatchSet((moving("moving.loss"),), root)
    patches.apply()
    del sys.modules["moving.other"]
    later = importlib.import_module("moving.other")
    assert later.renamed(1, 2) == 6
    patches.undo()
    assert later.renamed(1, 2) == 3 and later.renamed is sys.modules["moving.loss"].weigh


def test_without_a_root_only_the_defining_module_is_touched(moved):
    _, (loss, util, *_) = moved
    original = loss.weigh
    patches = PatchSet((moving("moving.loss"),))
    patches.apply()
    assert loss.weigh(1, 2) == 6 and util.weigh is original
    patches.undo()


def test_a_function_that_moved_and_changed_is_refused(moved):
    root, (loss, *_) = moved
    original = loss.weigh
    patches = PatchSet((moving("moving.gone", parameters=("loss", "t")),), root)
    patches.apply()
    assert patches.refused == {"weights": "weigh: expected parameters (loss, t), found (loss, timesteps)"}
    assert loss.weigh is original


def test_undo_refuses_when_a_holder_was_replaced_on_top(moved):
    root, (loss, util, other, script, *_) = moved
    patches = PatchSet((moving("moving.loss"),), root)
    patches.apply()
    ours, script.third = script.third, None
    with pytest.raises(RuntimeError, match=r"moving_script\.third was replaced again by somebody else"):
        patches.undo()
    script.third = ours
    patches.undo()
    assert loss.weigh is util.weigh is other.renamed is script.third and loss.weigh(1, 2) == 3


def test_unknown_homes_are_searched_for_definitions_not_for_who_holds_a_name(moved):
    root, _ = moved
    assert defining(root, "weigh") == ["moving.loss"] and defining(root, "renamed") == []
    (root / "moving" / "again.py").write_text("class A:\n    def weigh(self): pass\n\nclass weigh: pass\n")
    (root / "notes").mkdir()
    (root / "notes" / "copy.py").write_text("def weigh(loss): pass\n")  # no package: nobody can import it
    assert defining(root, "weigh") == ["moving.again", "moving.loss"]
