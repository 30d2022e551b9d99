"""Wheel and sdist hold every package, where design says: integrations/kohya is sdxl_fixes.kohya."""

import configparser
import email
import os
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml
from installing import fresh_python, packages, pip

from sdxl_fixes.version import __version__

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_all_packages_and_the_licence(built):
    names = zipfile.ZipFile(built[1]).namelist()
    for module in ("schedule", "kohya/__main__", "kohya/patches", "diffusers/__init__", "cli"):
        assert f"sdxl_fixes/{module}.py" in names
    nodes = ("schedule_file.py", "comfyui/__init__.py", "comfyui/pyproject.toml")
    for file in (*nodes, "webui/scripts/sdxl_fixes_schedule.py"):
        assert f"sdxl_fixes/uis/nodes/{file}" in names  # what sdxl-fixes comfyui|webui install copies
    for file in ("world.safetensors", "LICENSES.md", "tiny-sdxl/unet/config.json"):
        assert f"sdxl_fixes/demo/data/{file}" in names
    assert "sdxl_fixes/py.typed" in names and any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "integrations", "examples"))]


def test_sdist_holds_what_its_tests_need(built):
    """All that is tracked, but what a repository alone needs."""
    source = built[0]
    with tarfile.open(built[2]) as sdist:
        held = {Path(*Path(name).parts[1:]) for name in sdist.getnames()}
    tracked = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    missing = {file for file in tracked - held if not {"build", "__pycache__"} & set(file.parts)}
    assert {file.parts[0] for file in missing} <= {".ci", ".github", ".gitignore"}


def test_metadata_say_what_an_index_shows(built):
    wheel = zipfile.ZipFile(built[1])
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    said = email.message_from_bytes(wheel.read(name))
    assert said["License-Expression"] == "Apache-2.0" and said["Author"] and said["Keywords"]
    kinds = said.get_all("Classifier")
    assert "Typing :: Typed" in kinds and "Operating System :: OS Independent" in kinds
    assert [kind for kind in kinds if kind.startswith("Programming Language :: Python :: 3.")] == [
        f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)
    ]


def test_the_lowest_constraints_are_the_lower_bounds_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    bounds = dict(line.split(" >= ") for line in config["options"]["install_requires"].split("\n")[1:])
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    del bounds["torch"]  # one torch for all sets
    assert {name: (pins[name] + ".0").startswith(bound) for name, bound in bounds.items()} == dict.fromkeys(
        bounds, True
    )


def test_a_release_is_the_version_of_its_tag():
    """The release workflow's own lines, on this version's tag and on another."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["build"]["steps"]
    check = next(step["run"] for step in steps if "tag" in step.get("name", ""))

    def status(tag, changelog):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "sdxl_fixes").mkdir()
            (Path(folder) / "sdxl_fixes" / "version.py").write_bytes(
                (ROOT / "sdxl_fixes/version.py").read_bytes()
            )
            (Path(folder) / "CHANGELOG.md").write_text(changelog)
            command = ["bash", "-e", "-c", check]
            return subprocess.run(command, cwd=folder, env={**os.environ, "GITHUB_REF_NAME": tag}).returncode

    ours, dated = f"v{__version__}", f"# Changelog\n\n## {__version__} (2027-01-31)\n- all\n"
    assert status(ours, dated) == 0 and status("v9.9.9", dated) == 1
    assert status(ours, f"# Changelog\n\n## {__version__} (unreleased)\n") == 1
    assert status(ours, dated.replace(".", "x")) == 1


def test_sdist_installs(built, tmp_path):
    """The wheel and an editable install: tests/test_autostart.py."""
    python = fresh_python(tmp_path / "venv")
    pip(python, "install", "--no-deps", built[2])
    assert all(tmp_path / "venv" in folder.parents for folder in packages(python, tmp_path))
