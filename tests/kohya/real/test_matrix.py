"""Every SDXL trainer of every checkout that SD_SCRIPTS names, without and with the fixes: see matrix.py."""

import checkouts
import matrix
import pytest
from test_real_trainer import assets, pytestmark  # noqa: F401  (fixture, marks)


@pytest.mark.parametrize("script", matrix.SCRIPTS)
def test_off_is_upstream_to_the_bit_and_all_is_the_same_in_every_checkout(assets, script):  # noqa: F811
    cells, sentences = matrix.check(script, checkouts.named(), assets)
    if not cells:
        pytest.skip(f"no checkout in SD_SCRIPTS has {script}")
    assert not sentences, "\n".join([matrix.table(cells), *sentences])
