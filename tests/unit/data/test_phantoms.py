"""Phantoms: deterministic, quick, with masks and labels that are in the pixels."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medray.data.layouts import build_manifest
from medray.data.phantoms import PHANTOMS, phantom_manifest, read_phantom, write_phantom
from medray.data.phantoms.catalogue import _rendered
from medray.data.readers import read_case
from medray.errors import DataError


@pytest.mark.parametrize("name", PHANTOMS)
def test_every_phantom_is_deterministic_and_as_its_manifest_says(name: str) -> None:
    manifest = phantom_manifest(f"phantom://{name}?cases=7&seed=3")
    reference = manifest.cases[2].images[0]
    image, mask, label = read_phantom(reference)
    _rendered.cache_clear()
    again, mask_again, _ = read_phantom(reference)
    assert np.array_equal(image.array, again.array)
    other = read_phantom(manifest.cases[3].images[0])[0]
    assert image.array.shape != other.array.shape or not np.array_equal(image.array, other.array)

    assert image.array.dtype == np.float32
    assert np.array_equal(image.array, np.rint(image.array)), "whole numbers, so that files hold them exactly"
    assert (image.ndim, len(image.array), image.modality) == (manifest.ndim, manifest.channels, manifest.modality)
    assert label == manifest.cases[2].label
    if manifest.task == "segmentation":
        assert mask is not None and mask_again is not None
        assert mask.array.shape == image.shape
        assert np.array_equal(mask.array, mask_again.array)
        assert mask.array.max() < len(manifest.classes)
    else:
        assert mask is None


def test_seeds_make_other_phantoms() -> None:
    first, second = (read_phantom(f"phantom://xray-nodules?seed={seed}")[0].array for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", [n for n, spec in PHANTOMS.items() if spec.task == "segmentation"])
def test_every_class_is_shown_and_lesions_differ_from_what_is_around(name: str) -> None:
    manifest = phantom_manifest(f"phantom://{name}?cases=12")
    seen: Counter[int] = Counter()
    for case in manifest.cases:
        _, mask, _ = read_phantom(case.images[0])
        assert mask is not None
        seen.update(int(v) for v in np.unique(mask.array))
    assert all(seen[k] >= 6 for k in range(len(manifest.classes))), seen


def test_liver_lesions_are_darker_than_liver_by_some_tens_of_hu() -> None:
    gaps = []
    for case in phantom_manifest("phantom://ct-lesions?cases=12").cases:
        image, mask, _ = read_phantom(case.images[0])
        assert mask is not None
        if (mask.array == 2).sum() > 50:
            gaps.append(image.array[0][mask.array == 1].mean() - image.array[0][mask.array == 2].mean())
    assert len(gaps) >= 6
    assert 30 < np.mean(gaps) < 95


def test_air_is_air_and_noise_is_the_scanners() -> None:
    sigma = {}
    for case in phantom_manifest("phantom://ct-lesions?cases=12").cases:
        image = read_phantom(case.images[0])[0]
        corner = image.array[0, :4, -4:, :]
        assert -1024 <= corner.mean() < -980
        sigma.setdefault(case.site, []).append(read_phantom(case.images[0])[0].array[0, :4, -4:].std())
    assert len(sigma) == 3
    assert np.mean(sigma["north"]) < np.mean(sigma["east"])


def test_mr_noise_is_rician() -> None:
    """Outside the head the magnitude follows Rayleigh's law: its mean is 1.91 standard deviations."""
    ratios = []
    for case in phantom_manifest("phantom://mr-lesions?cases=6").cases:
        image = read_phantom(case.images[0])[0].array[0]
        corner = np.concatenate([image[:4, :4].ravel(), image[-4:, -4:].ravel()])
        ratios.append(corner.mean() / corner.std())
    assert np.mean(ratios) == pytest.approx(1.91, abs=0.2)


def test_labels_are_balanced_within_each_block() -> None:
    binary = Counter(case.label for case in phantom_manifest("phantom://xray-nodules?cases=40").cases)
    assert binary == {0: 20, 1: 20}
    flags = Counter(case.label for case in phantom_manifest("phantom://xray-findings?cases=32").cases)
    assert set(flags.values()) == {4} and len(flags) == 8


def test_nodules_are_in_the_pixels() -> None:
    """The same patient and noise with and without: what differs is brighter and small."""
    from medray.data.phantoms.catalogue import _patient, _rng, _scanner

    spec = PHANTOMS["xray-nodules"]
    for index in range(5):
        made = []
        for flags in ((1, 0), (0, 1)):
            scanner = _scanner(spec, 0, _patient(index))
            person, picture = _rng(0, _patient(index), "a"), _rng(0, index, "b")
            made.append(spec.render(person, picture, scanner, (64, 64), flags).array[0])
        # The generator has moved on after the nodule was placed, so noise differs; the nodule stands out of it.
        gap = made[1] - made[0]
        assert gap.max() > 4 * gap.std()


def test_patients_come_with_two_images_and_one_scanner() -> None:
    cases = phantom_manifest("phantom://ct-lesions?cases=20").cases
    count = Counter(case.patient for case in cases)
    assert set(count.values()) == {1, 2}
    for patient in count:
        assert len({case.site for case in cases if case.patient == patient}) == 1
        assert len({str(case.columns) for case in cases if case.patient == patient}) == 1
    assert len({case.site for case in cases}) == 3


def test_size_scales_the_default_shape() -> None:
    whole = read_phantom("phantom://ct-nodule-type?size=16")[0]
    assert whole.shape == (16, 16, 16)
    given = read_phantom("phantom://ct-nodule-type?size=16x12x20")[0]
    assert given.shape == (16, 12, 20)
    assert given.spacing == pytest.approx((2.5, 40 / 12, 2.0))
    manifest = build_manifest("phantom://fundus-lesions?size=32&cases=2")
    assert "size=32x32" in manifest.cases[0].images[0]


def test_valid_is_the_field_of_view() -> None:
    case = phantom_manifest("phantom://fundus-vessels?cases=1").cases[0]
    image, mask, valid = read_case(case, Path())
    assert mask is not None and valid is not None
    assert 0.6 < valid.array.mean() < 0.85
    assert not mask.array[valid.array == 0].any()
    assert image.array[:, valid.array == 0].max() < 60


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("phantom://ct-lesion", "Did you mean ct-lesions?"),
        ("phantom://ct-lesions?sed=1", "unknown key 'sed'"),
        ("phantom://ct-lesions?seed=-1", "seed='-1'"),
        ("phantom://ct-lesions?cases=0", "cases='0'"),
        ("phantom://ct-lesions?size=99999", "size='99999'"),
        ("phantom://ct-lesions?size=4", "8 to 1024"),
        ("phantom://ct-lesions?size=1024", "8 to 1024"),
        ("phantom://ct-lesions?size=48x48", "such as 48x48x32"),
        ("phantom://ct-lesions?part=valid", "part='valid'"),
    ],
)
def test_a_wrong_reference_says_what_is_wrong(reference: str, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("?", r"\?")):
        read_phantom(reference)


def test_three_dimensional_ones_are_quick() -> None:
    read_phantom("phantom://ct-lesions?index=0")
    start = time.process_time()
    for index in range(1, 6):
        read_phantom(f"phantom://ct-lesions?index={index}")
    assert (time.process_time() - start) / 5 < 0.25  # about 0.03 s on an idle core


@pytest.mark.parametrize("name", ["ct-lesions", "fundus-vessels", "xray-findings", "xray-nodules"])
def test_written_phantoms_read_back_as_they_were(name: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    table = write_phantom(name, tmp_path / "set", cases=4, size=24, progress=lambda *s: steps.append(s))
    made, read = phantom_manifest(f"phantom://{name}?cases=4&size=24"), build_manifest(str(table))
    assert [s[:2] for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for field in ("task", "ndim", "channels", "classes"):
        assert getattr(read, field) == getattr(made, field)
    for ours, theirs in zip(made.cases, read.cases, strict=True):
        for field in ("id", "label", "patient", "site", "columns"):
            assert getattr(ours, field) == getattr(theirs, field)
        image, mask, valid = read_case(theirs, Path(read.root))
        expected, expected_mask, expected_valid = read_case(ours, Path())
        assert np.array_equal(image.array, expected.array)
        for got, wanted in ((mask, expected_mask), (valid, expected_valid)):
            assert (got is None) == (wanted is None)
            assert got is None or wanted is None or np.array_equal(got.array, wanted.array)
        if image.spacing is not None:
            assert image.spacing == pytest.approx(expected.spacing, rel=1e-5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_phantom("xray-nodules", tmp_path / "file", cases=1)
