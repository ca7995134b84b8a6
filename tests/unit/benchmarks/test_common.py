"""The benchmarks' frame: results files, tables, the page made from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.__main__ import main
from benchmarks.common import Figure, Result, Target, render

RESULT = Result(
    figures={"dice": Figure(value=0.891, low=0.88, high=0.9), "wall": Figure(value=1203.4, unit="s")},
    targets={"dice": Target(op=">=", value=0.89), "wall": Target(op="<=", value=1200)},
    peers={"nnU-Net": {"dice": Figure(value=math.nan), "gpu": Figure(value=1, unit="h")}},
    notes=["two cores"],
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text('"""Is it fast?"""\n', encoding="utf-8")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    return tmp_path


def test_results_file_follows_the_schema_and_reads_back(tmp_path: Path) -> None:
    path = RESULT.save("toy", tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"date", "machine", "versions", "figures", "targets", "met", "peers"} <= set(document)
    assert document["figures"]["dice"] == {"value": 0.891, "low": 0.88, "high": 0.9, "unit": ""}
    assert document["targets"]["wall"] == {"op": "<=", "value": 1200}
    assert document["met"] == {"dice": True, "wall": False}
    assert document["peers"]["nnU-Net"]["dice"]["value"] is None  # JSON has no NaN
    assert document["machine"]["cores"] >= 1 and document["versions"]["python"]
    again, _ = Result.load(path)
    assert again.table() == RESULT.table()


def test_table_shows_target_verdict_and_peer() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in RESULT.table().splitlines()[:5]]
    assert rows[0] == ["figure", "medray", "target", "nnU-Net"]
    assert rows[2] == ["dice", "0.891 [0.88, 0.9]", ">= 0.89 ✓", "nan"]
    assert rows[3] == ["wall", "1,203 s", "<= 1,200 ✗", ""]
    assert rows[4] == ["gpu", "", "", "1 h"]


def test_a_target_needs_its_figure_and_nan_meets_none() -> None:
    with pytest.raises(ValueError, match="targets without a figure: dise"):
        Result(figures={"dice": Figure(value=1)}, targets={"dise": Target(op=">=", value=1)})
    assert not Target(op=">=", value=0).met(Figure(value=math.nan))


def test_the_page_is_made_from_the_files(bench: Path) -> None:
    assert "Not run yet" in render(bench)
    RESULT.save("toy", bench)
    page = render(bench)
    assert "## toy\n\nIs it fast?" in page and "0.891 [0.88, 0.9]" in page and "two cores" in page


def test_the_committed_page_is_the_rendered_one() -> None:
    assert (common.FOLDER / "README.md").read_text(encoding="utf-8") == render(), "run: python -m benchmarks report"


def test_command_line_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(common.names())
