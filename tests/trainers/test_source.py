"""A trainer's source, read without importing it: what a script comes to call, and what is the trainer's."""

import pytest

from sdxl_fixes.trainers.source import belongs, called, defines, defining, module_name, sources

FILES = {
    "train.py": """
import library.loss as loss_util
import library.unused
from library.model import UNet, build as make
from library import tables

class Trainer(Base):
    def step(self, batch):
        return loss_util.loss(batch)
    def never_named(self):
        only_in_an_unused_method()

def unused_function():
    only_in_an_unused_function()

if __name__ == "__main__":
    Trainer().step(make())
    tables.CRITERIA["l2"]()
""",
    "library/loss.py": """
from library.helper import huber as pseudo
criterion = pseudo
def loss(batch):
    return criterion(batch)
def other_loss(batch):
    only_in_another_loss()
""",
    "library/helper.py": """
def huber(batch):
    deepest()
def deepest():
    pass
""",
    "library/model.py": """
from .blocks import Block
class UNet(Block):
    def forward(self, x):
        in_forward()
    def __call__(self, x):
        in_call()
    def spare(self):
        in_spare()
def build():
    return UNet()
""",
    "library/blocks.py": """
class Block:
    def __init__(self):
        in_a_bases_init()
""",
    "library/tables.py": """
def squared():
    in_a_table()
CRITERIA = {"l2": squared}
""",
    "library/unused.py": """
def nobody():
    in_an_unused_module()
""",
    "library/foreign.py": """
def huber():
    in_a_module_that_is_not_imported()
""",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


REACHED = {
    "a function by its module's other name": {"loss"},
    "a function by two other names": {"pseudo", "huber", "deepest"},
    "a function imported under another name": {"make", "build"},
    "a method that is named": {"Trainer", "step"},
    "a class, its forward and what python calls": {"UNet", "in_forward", "in_call"},
    "a base from a relative import": {"Block", "in_a_bases_init"},
    "a function that a table holds": {"squared", "in_a_table"},
}


@pytest.mark.parametrize("what", REACHED)
def test_what_a_script_reaches(root, what):
    assert REACHED[what] <= called(root, "train.py")


@pytest.mark.parametrize(
    "name",
    [
        *("unused_function", "only_in_an_unused_function", "never_named", "only_in_an_unused_method"),
        *("other_loss", "only_in_another_loss", "spare", "in_spare", "nobody", "in_an_unused_module"),
        "in_a_module_that_is_not_imported",
    ],
)
def test_what_it_does_not(root, name):
    assert any(name in text for text in FILES.values()) and name not in called(root, "train.py")


def test_a_function_that_is_named_anywhere_counts_as_called(root):
    """Too much is said, never too little."""
    file, text = root / "library" / "loss.py", FILES["library/loss.py"]
    file.write_text(text + "loss.fallback = lambda: other_loss\n")
    assert "other_loss" not in called(root, "train.py")  # at the top of a module that is only imported
    file.write_text(text.replace("criterion(batch)", "pick(other_loss)"))
    assert {"other_loss", "only_in_another_loss"} <= called(root, "train.py")


def test_modules_of_the_trainer_and_their_names(root):
    (root / "networks").mkdir()
    (root / "networks" / "lora.py").write_text("def huber(): pass\n")
    (root / "tools").mkdir()  # no package
    (root / "tools" / "convert.py").write_text("def huber(): pass\n")
    names = [module_name(file, root) for file in sources(root)]
    assert {"train", "networks.lora", "library.helper"} <= set(names) and "tools.convert" not in names
    assert defining(root, "huber") == ["library.foreign", "library.helper", "networks.lora"]
    assert defining(root, "pseudo") == []  # a name that is imported is defined elsewhere
    assert defines(root, "library.loss", "pseudo") and not defines(root, "library.loss", "huber")
    assert not defines(root, "library.gone", "huber")


def test_an_environment_in_the_trainers_folder_is_not_the_trainers(root):
    assert belongs(str(root / "library" / "loss.py"), str(root.resolve()))
    for foreign in ("venv/lib/python3.11/site-packages/library/loss.py", "../loss.py"):
        assert not belongs(str(root / foreign), str(root.resolve()))


def test_a_name_that_a_library_defines_is_left_to_the_import(root):
    from sdxl_fixes.trainers.patching import Patch, check_source

    (root / "library" / "saving.py").write_text("from safetensors.torch import save_file\n")
    patch = Patch(("saving",), "library.saving:save_file", ("anything",), print, "")
    assert check_source(patch, root) is None
    (root / "library" / "saving.py").write_text("")
    assert "save_file: expected a function" in check_source(patch, root)
