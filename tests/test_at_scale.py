"""docs/at-scale.md says what benchmarks/at_scale.py computes, and that agrees with what two runs are known to
have cost."""

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from at_scale import Rates, duration, report, steps, stored

PAGE = Path(__file__).resolve().parent.parent / "docs" / "at-scale.md"


def test_the_page_has_the_tables():
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for line in report(Rates(), [10e6, 100e6]).splitlines():
        assert line in page, f"{line}: run python benchmarks/at_scale.py and put its tables into the page"


def test_the_published_runs_come_out():
    """bigASP v2: 40 M samples at 80 a second on 8 cards. v2.5: 150 M at 300 on 32, about $16,000."""
    second = Rates(train=10, epochs=40 / 6.7)
    hours = dict((name, hours) for name, hours, _ in steps(second, 6.7e6))["train"]
    assert hours / 8 == pytest.approx(40e6 / 80 / 3600, rel=1e-9)
    assert duration(hours / 8 * 3600) == "139 h"
    third = Rates(train=300 / 32, epochs=150 / 13, dollars=3.6)
    hours = dict((name, hours) for name, hours, _ in steps(third, 13e6))["train"]
    assert hours * third.dollars == pytest.approx(16_000, rel=0.01)


def test_bytes_are_those_of_the_tensors():
    sizes = dict(stored(Rates(checkpoints=1), 1e6))
    assert sizes["latents"] == pytest.approx(1e6 * 109e3) and sizes["pictures"] == 1e12
    # weights, two moments and the average in float32; two folders of U-Net and both text encoders
    assert sizes["checkpoints that are kept"] == 4 * (4 * 2.567e9 + 2 * (2.567e9 + 0.82e9))


def test_the_bucket_plan_s_row_is_of_a_whole_epoch(monkeypatch, capsys):
    """A state is of the page's bytes at any size but for digits, and what is read is every rank's share."""
    pytest.importorskip("resource", reason="POSIX")
    import buckets_at_scale

    read = []
    some = SimpleNamespace(islice=lambda batches, n: read.append(list(islice(batches, n))) or read[0])
    monkeypatch.setattr(buckets_at_scale, "itertools", some)
    monkeypatch.setattr(sys, "argv", ["buckets_at_scale.py", "5e3"])
    buckets_at_scale.main()
    row = json.loads(capsys.readouterr().out)
    assert row.pop("samples") == 5000 and all(value >= 0 for value in row.values())
    assert row["peak_gb"] >= row["given_gb"] > 0 and 200 <= row["state_bytes"] <= 221
    assert "221 bytes" in PAGE.read_text(encoding="utf-8")
    batch, ranks = buckets_at_scale.BATCH, buckets_at_scale.RANKS
    assert sum(map(len, read[0])) == pytest.approx(5000 / ranks, rel=0.1)  # but for the first batch
    assert {len(each) for each in read[0]} <= {*range(1, batch + 1)}
