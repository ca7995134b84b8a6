"""Fingerprints out of sums over public bins: near the exact one, bounded for every patient, honest about noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from medray.data import fingerprint
from medray.data import fingerprint_sums as sums
from medray.data.checks import check
from medray.data.fingerprint import measure
from medray.data.fingerprint_sums import Bins, Layout, Schema, fingerprint_of, sums_of
from medray.data.layouts import build_manifest
from medray.data.manifest import Case, Manifest
from medray.errors import FederationError


def part(manifest: Manifest, chosen: slice) -> Manifest:
    return manifest.model_copy(update={"cases": manifest.cases[chosen]})


@pytest.fixture(scope="module")
def lesions() -> Manifest:
    return check(build_manifest("phantom://ct-lesions?cases=12"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rng = np.random.default_rng(0)
    lines = ["patient,age,marker,label"]
    for row in range(3000):
        age, marker = rng.normal(60, 10), rng.normal()
        text = "" if row % 50 == 0 else f"{marker:.3f}"
        lines.append(f"p{row // 2},{age:.2f},{text},{int(age > 65)}")
    path = tmp_path_factory.mktemp("table") / "cases.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return check(build_manifest(f"{path}?columns=age,marker"))


def test_the_sums_of_two_sites_come_near_what_all_data_together_have(lesions: Manifest) -> None:
    layout = Layout(Schema.of(lesions), coarse=False)
    total = sums_of(part(lesions, slice(0, 5)), layout) + sums_of(part(lesions, slice(5, None)), layout)
    found, exact = fingerprint_of(total, layout), measure(lesions)
    for name in ("task", "ndim", "channels", "modality", "classes", "cases", "patients", "columns", "class_cases"):
        assert getattr(found, name) == getattr(exact, name), name
    assert found.shape_min == exact.shape_min and found.shape_max == exact.shape_max
    assert np.allclose(found.shape_median, exact.shape_median, atol=1)
    assert exact.spacing_median is not None and found.spacing_median is not None
    assert np.allclose(found.spacing_median, exact.spacing_median, rtol=0.02)
    for mine, its in zip(found.intensity, exact.intensity, strict=True):
        reach = its.p995 - its.p005
        for name in ("mean", "std", "p005", "p50", "p995"):
            assert abs(getattr(mine, name) - getattr(its, name)) < 0.1 * reach, name
    for name, value in exact.class_fraction.items():
        assert found.class_fraction[name] == pytest.approx(value, abs=0.02)


def test_a_table_with_gaps(table: Manifest) -> None:
    layout = Layout(Schema.of(table), coarse=False)
    found, exact = fingerprint_of(sums_of(table, layout), layout), measure(table)
    assert (found.cases, found.patients) == (3000, 1500) and found.class_cases == exact.class_cases
    age, marker = found.intensity[0], found.intensity[1]
    assert age.mean == pytest.approx(60, abs=1) and age.std == pytest.approx(10, abs=1)
    assert marker.mean == pytest.approx(0, abs=0.1) and marker.std == pytest.approx(1, abs=0.1)


def test_no_patient_adds_more_than_is_said(lesions: Manifest, table: Manifest) -> None:
    for manifest in (lesions, table):
        layout = Layout(Schema.of(manifest), coarse=True)
        whole = sums_of(manifest, layout)
        for group in sorted({case.group for case in manifest.cases})[:3]:
            others = tuple(case for case in manifest.cases if case.group != group)
            length = float(np.linalg.norm(whole - sums_of(manifest.model_copy(update={"cases": others}), layout)))
            assert 0.9 < length <= layout.sensitivity + 1e-9


@pytest.mark.parametrize("coarse", [False, True])
def test_a_patient_adds_its_own_row_whoever_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    """Also where samples are drawn, and where there are so many cases that `measure` draws smaller ones."""
    monkeypatch.setattr(fingerprint, "_SAMPLES", 200 * 300)
    monkeypatch.setattr(sums, "SAMPLES_A_CASE", 300)
    rng = np.random.default_rng(0)
    for number in range(201):
        pixels = (rng.random((24, 24)) ** (1 + number % 3) * 255).astype(np.uint8)
        path = tmp_path / f"class{number % 2}" / f"p{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Picture.fromarray(pixels).save(path)
    manifest = check(build_manifest(str(tmp_path)))
    assert len({case.group for case in manifest.cases}) == 201
    layout = Layout(Schema.of(manifest), coarse=coarse)

    def added(*cases: Case) -> np.ndarray:
        return sums_of(manifest.model_copy(update={"cases": cases}), layout)

    whole = added(*manifest.cases)
    for place in (0, 100, 200):
        without = added(*manifest.cases[:place], *manifest.cases[place + 1 :])
        np.testing.assert_allclose(whole - without, added(manifest.cases[place]), rtol=0, atol=1e-9)


def test_what_shows_one_class_alone_is_not_divided_among_all() -> None:
    """Grades are one of their classes, as kinds are: noise is for what they can come to, and no more."""
    kinds = check(build_manifest("phantom://xray-nodules?cases=8&size=16"))
    grades, labels = (
        Layout(Schema.of(kinds).model_copy(update={"task": task}), coarse=True) for task in ("ordinal", "multilabel")
    )
    assert grades.shown() == Layout(Schema.of(kinds), coarse=True).shown() == 1.0
    assert labels.shown() == pytest.approx(2**0.5)


def test_with_noise_it_is_still_of_use_or_says_that_it_is_not(table: Manifest) -> None:
    layout, rng = Layout(Schema.of(table), coarse=True), np.random.default_rng(0)
    total = sums_of(table, layout)
    assert layout.size < 1000 < Layout(Schema.of(table), coarse=False).size
    found = fingerprint_of(total + rng.normal(0, 20, layout.size), layout, noise=20.0)
    assert found.patients == pytest.approx(1500, abs=80) and found.cases == found.patients
    assert found.intensity[0].mean == pytest.approx(60, abs=8)
    assert found.class_cases["1"] == pytest.approx(sum(c.label == 1 for c in table.cases) / 2, abs=120)
    with pytest.raises(FederationError, match="exceeds the noise"):
        fingerprint_of(total + rng.normal(0, 2000, layout.size), layout, noise=2000.0)


def test_bins_keep_what_is_alike_alike_and_strangers_out(lesions: Manifest, table: Manifest) -> None:
    layout = Layout(Schema.of(lesions), coarse=False)
    for size in (1, 28, 100, 512):
        assert layout.shape.edges[layout.shape.place([size])[0]] == size
    assert Bins(np.array([0.0, 1.0, 2.0])).counts([-5, 0.5, 1.0, 99]).tolist() == [2.0, 2.0]
    assert Bins(np.array([0.0, 1.0, 2.0])).quantile(np.array([1.0, 3.0]), 0.25) == pytest.approx(1.0)
    with pytest.raises(FederationError, match="another task"):
        sums_of(table, layout)
