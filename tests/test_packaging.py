"""Wheel, sdist and editable installs hold every package, where design says: integrations/kohya is
sdxl_fixes.kohya."""

import os
import zipfile
from pathlib import Path

import pytest
from installing import LIBRARIES, call, fresh_python

PROBE = f"""
import sys
sys.path.append({LIBRARIES!r})  # appended, so that no .pth file there is run
import sdxl_fixes, sdxl_fixes.kohya, sdxl_fixes.diffusers, sdxl_fixes.kohya.patches, importlib.metadata as m
files = [module.__file__ for module in (sdxl_fixes, sdxl_fixes.kohya, sdxl_fixes.diffusers)]
print(*files, m.version("sdxl-fixes"), sep="\\n")
"""


@pytest.fixture
def python(tmp_path):
    """A fresh environment's python."""
    return fresh_python(tmp_path / "venv")


def probe(python, cwd):
    *files, version = call(python, "-c", PROBE, cwd=cwd, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert version == "0.1.0"
    return [Path(file) for file in files]


def test_wheel_holds_all_packages_and_the_licence(built):
    names = zipfile.ZipFile(built[1]).namelist()
    for module in ("schedule", "kohya/__main__", "kohya/patches", "diffusers/__init__", "cli"):
        assert f"sdxl_fixes/{module}.py" in names
    for file in ("schedule_file.py", "comfyui/__init__.py", "webui/scripts/sdxl_fixes_schedule.py"):
        assert f"sdxl_fixes/uis/nodes/{file}" in names  # what sdxl-fixes comfyui|webui install copies
    assert "sdxl_fixes/py.typed" in names and any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "integrations", "examples"))]


def test_wheel_installs(built, python, tmp_path):
    call(python, "-m", "pip", "install", "--no-deps", built[1])
    assert all(tmp_path / "venv" in file.parents for file in probe(python, tmp_path))


def test_sdist_installs(built, python, tmp_path):
    call(python, "-m", "pip", "install", "--no-deps", built[2])
    assert all(tmp_path / "venv" in file.parents for file in probe(python, tmp_path))


@pytest.mark.parametrize("inside", [False, True], ids=["from elsewhere", "from the source folder"])
def test_editable_install_reads_the_source(built, python, tmp_path, inside):
    source = built[0]
    call(python, "-m", "pip", "install", "--no-deps", "-e", source)
    expected = [
        source / "sdxl_fixes",
        source / "integrations" / "kohya",
        source / "integrations" / "diffusers",
    ]
    assert [file.parent for file in probe(python, source if inside else tmp_path)] == expected
