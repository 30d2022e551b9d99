"""For all tests: no test fails because the machine is busy, a run repeats the one before (others' examples:
``--hypothesis-seed=NUMBER``), and the package is built once."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from installing import call

ROOT = Path(__file__).resolve().parent.parent
os.environ["COLUMNS"] = "80"  # argparse folds its help there, whatever terminal it is

settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A copy of the tracked files, and the wheel made from the sdist made from it: (copy, wheel, sdist)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = call(
        "git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"
    )
    for file in files:
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    call(sys.executable, "-m", "build", "--outdir", out, source)  # sdist, then the wheel from it
    return source, next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
