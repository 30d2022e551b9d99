"""``sdxl_fixes`` offers the parts by name and imports them when they are asked for."""

import importlib
import pickle
import subprocess
import sys

import pytest

import sdxl_fixes

NAMES = [name for name in sdxl_fixes.__all__ if name != "__version__"]


def run(code):
    """What ``code`` prints in a fresh Python."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_it_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'safetensors'}"
    assert run(f"import sys, sdxl_fixes; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_every_name_is_promised_and_kept_in_one_place():
    offered = [name for names in sdxl_fixes._HOMES.values() for name in names]
    assert sorted([*offered, "schedulers"]) == sorted(NAMES)
    assert set(sdxl_fixes.__all__) <= set(dir(sdxl_fixes))
    static = sdxl_fixes.__loader__.get_source("sdxl_fixes").split("if TYPE_CHECKING:")[1].split("__all__")[0]
    for home, names in sdxl_fixes._HOMES.items():  # what mypy and editors are told is the same
        assert f"    from sdxl_fixes.{home} import {', '.join(names)}\n" in static


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_the_modules_own_object(name):
    offered = getattr(sdxl_fixes, name)
    if name == "schedulers":
        assert offered is importlib.import_module("sdxl_fixes.schedulers")
    else:
        assert offered is getattr(importlib.import_module(offered.__module__), name)
        assert offered.__module__.startswith("sdxl_fixes.") and offered.__name__ == name


def test_a_star_brings_all_of_them():
    code = "from sdxl_fixes import *; print(sorted(name for name in globals() if not name.startswith('_')))"
    assert run(code) == f"{sorted(NAMES)}\n"


def test_a_wrong_name_is_pythons_own_error():
    with pytest.raises(AttributeError, match=r"^module 'sdxl_fixes' has no attribute 'NoiseShedule'$"):
        _ = sdxl_fixes.NoiseShedule
    with pytest.raises(ImportError, match=r"cannot import name 'NoiseShedule' from 'sdxl_fixes'"):
        from sdxl_fixes import NoiseShedule  # noqa: F401
    assert not hasattr(sdxl_fixes, "fix_everything")


def test_objects_pickled_here_are_read_where_nothing_is_imported_yet():
    parts = (sdxl_fixes.MinSNR(5, floor=True), sdxl_fixes.NoiseSchedule.cosine(), sdxl_fixes.fix_scheduler)
    code = f"import pickle; print(*pickle.loads({pickle.dumps(parts)!r})[:2], sep='\\n')"
    assert run(code) == f"{parts[0]}\n{parts[1]}\n"
