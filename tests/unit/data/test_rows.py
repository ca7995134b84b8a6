"""Rows of a table as what a network sees: kinds, gaps, and other tables with the same columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medray.config.schema import PreprocessConfig
from medray.data.checks import check, require_sound
from medray.data.fingerprint import measure
from medray.data.layouts import build_manifest
from medray.data.preprocess import Preprocessor
from medray.data.readers import read_image
from medray.data.rows import Column, reference, width
from medray.errors import DataError, UnreadableError
from medray.plan.plan import normalisation
from medray.workflows.inputs import expand

HEADER = "site,age,sex;m/f,stage,chol,label"
ROWS = ["a,60,F,1,200,0", "a,40,M,2,,1", "b,50,F,4,240,1", "b,,M,1,220,0", "b,70,M,2,180,1"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "cases.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n", encoding="utf-8")
    return path


def test_numbers_kinds_and_gaps_become_channels(table: Path) -> None:
    found = build_manifest(f"{table}?columns=age,sex;m/f,stage:kind,chol")
    assert found.columns == ("age?", "sex%3Bm%2Ff=F|M", "stage=1|2|4", "chol?") and found.modality == "table"
    assert found.channels == width(found.columns) == 9 and found.task == "classification"
    assert {case.site for case in found.cases} == {"a", "b"} and found.cases[1].columns["chol"] is None
    rows = np.stack([read_image(case.images[0], table.parent).array.ravel() for case in found.cases])
    assert rows[0].tolist() == [60, 0, 1, 0, 1, 0, 0, 200, 0]
    assert np.isnan(rows[1][7]) and rows[1][8] == 1 and np.isnan(rows[3][0]) and rows[3][1] == 1
    checked = check(found)
    require_sound(checked)
    assert sorted(f.rule for f in checked.findings) == ["missing", "missing"]
    assert "lacks 1 of 5" in checked.findings[0].message


def test_gaps_become_the_mean_and_numbers_are_standardised(table: Path) -> None:
    found = build_manifest(f"{table}?columns=age,chol,stage:kind")
    fingerprint = measure(found)
    assert fingerprint.intensity[0].mean == pytest.approx(55.0) and fingerprint.intensity[0].count == 4
    config = PreprocessConfig.model_validate(normalisation(fingerprint))
    preprocessor = Preprocessor(config, ndim=2, channels=found.channels)
    rows = np.stack([preprocessor.prepare(read_image(c.images[0], table.parent))[0].ravel() for c in found.cases])
    known = np.array([0, 1, 2, 4])
    assert rows[known, 0].mean() == pytest.approx(0, abs=1e-6) and rows[known, 0].std() == pytest.approx(1, abs=1e-5)
    assert rows[3, 0] == 0 and rows[3, 1] == 1 and rows[1, 2] == 0 and rows[1, 3] == 1
    assert set(rows[:, 4:].ravel().tolist()) == {0.0, 1.0}


def test_all_columns_and_other_tables(table: Path, tmp_path: Path) -> None:
    found = build_manifest(f"{table}?columns=*")
    assert [Column.parse(text).name for text in found.columns] == ["age", "sex;m/f", "stage", "chol"]
    other = tmp_path / "new.csv"
    other.write_text("id,chol,age,extra,sex;m/f,stage\nx,210,33,hello,D,3\n", encoding="utf-8")
    (item,) = expand([str(other)], ndim=2, channels=found.channels, columns=found.columns)
    assert item.name == "x"
    assert read_image(item.references[0], Path()).array.ravel().tolist() == [33, 0, 0, 0, 3, 210, 0]  # D: no kind set
    with pytest.raises(DataError, match="no table"):
        expand([str(tmp_path)], ndim=2, channels=7, columns=found.columns)


def test_what_is_wrong_is_said(table: Path) -> None:
    wrong = {
        "columns=agee": "did you mean 'age'",
        "columns=label": "no column 'label'",
        "columns=": "no column to learn",
    }
    for query, said in wrong.items():
        with pytest.raises(DataError, match=said):
            build_manifest(f"{table}?{query}")
    with pytest.raises(DataError, match="columns="):
        build_manifest(str(table))
    with pytest.raises(UnreadableError, match="row 9 of 5"):
        read_image(reference("cases.csv", 9, ("age",)), table.parent)
    with pytest.raises(UnreadableError, match="a number is expected"):
        read_image(reference("cases.csv", 0, ("sex%3Bm%2Ff",)), table.parent)
    with pytest.raises(UnreadableError, match="no column 'weight'"):
        read_image(reference("cases.csv", 0, ("weight",)), table.parent)


def test_many_columns_make_no_file_name(tmp_path: Path) -> None:
    names = [f"a-rather-long-name-of-a-laboratory-value-{k}" for k in range(40)]
    path = tmp_path / "wide.csv"
    path.write_text(",".join([*names, "label"]) + "\n" + "\n".join(",".join(["1"] * 40 + [str(k)]) for k in (0, 1)))
    found = build_manifest(f"{path}?columns=*")
    assert len(found.cases[0].images[0]) > 1000
    assert read_image(found.cases[0].images[0], tmp_path).array.shape == (40, 1, 1)
    measure(found)
