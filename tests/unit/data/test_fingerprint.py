"""The fingerprint against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medray.data.fingerprint import Fingerprint, measure
from medray.data.layouts import build_manifest
from medray.data.phantoms import read_phantom, write_phantom
from medray.errors import DataError


def test_segmentation_against_numbers_by_hand() -> None:
    manifest = build_manifest("phantom://ct-lesions?cases=8&size=24")
    steps: list[int] = []
    made = measure(manifest, progress=lambda done, *_: steps.append(done))
    read = [read_phantom(c.images[0]) for c in manifest.cases]
    inside = np.concatenate([i.array[0][m.array > 0] for i, m, _ in read if m is not None])
    labels = np.concatenate([m.array.ravel() for _, m, _ in read if m is not None])
    stats = made.intensity[0]
    assert stats.mean == pytest.approx(inside.mean(), rel=1e-5)
    assert stats.std == pytest.approx(inside.std(), rel=1e-5)
    assert (stats.p005, stats.p50, stats.p995) == pytest.approx(tuple(np.percentile(inside, [0.5, 50, 99.5])), rel=1e-4)
    assert made.class_fraction["lesion"] == pytest.approx((labels == 2).mean())
    assert sum(made.class_fraction.values()) == pytest.approx(1)
    assert made.class_cases["lesion"] == sum(bool((m.array == 2).any()) for _, m, _ in read if m is not None)
    shapes = np.array([i.shape for i, _, _ in read])
    assert made.shape_min == tuple(shapes.min(0)) and made.shape_max == tuple(shapes.max(0))
    spacings = np.array([i.spacing for i, _, _ in read])
    assert made.spacing_median == pytest.approx(tuple(np.median(spacings, axis=0)), abs=1e-5)
    assert made.bytes_total == sum(4 * i.array.size for i, _, _ in read)
    assert made.patients == len({c.patient for c in manifest.cases})
    assert sum(made.sites.values()) == 8
    assert steps == list(range(1, 9))


def test_classification_uses_all_pixels() -> None:
    manifest = build_manifest("phantom://xray-nodules?cases=8&size=16")
    made = measure(manifest)
    pixels = np.stack([read_phantom(c.images[0])[0].array for c in manifest.cases])
    assert made.intensity[0].mean == pytest.approx(pixels.mean(), rel=1e-5)
    assert made.class_cases == {"normal": 4, "nodule": 4}
    assert made.class_fraction == {"normal": 0.5, "nodule": 0.5}
    assert made.spacing_median is None


def test_multilabel_shares_are_of_cases() -> None:
    made = measure(build_manifest("phantom://xray-findings?cases=16&size=16"))
    assert made.class_cases == {"cardiomegaly": 8, "effusion": 8, "nodule": 8}


def test_the_region_of_interest_bounds_what_counts() -> None:
    manifest = build_manifest("phantom://fundus-vessels?cases=4")
    without = manifest.model_copy(update={"cases": tuple(c.model_copy(update={"valid": None}) for c in manifest.cases)})
    inside, everywhere = (measure(m).class_fraction["vessel"] for m in (manifest, without))
    assert inside > 1.2 * everywhere


def test_the_test_split_is_never_looked_at() -> None:
    manifest = build_manifest("phantom://xray-nodules?cases=8&size=16")
    cases = tuple(
        c.model_copy(update={"split": "train"} if k < 6 else {"split": "test", "images": ("not there.png",)})
        for k, c in enumerate(manifest.cases)
    )
    made = measure(manifest.model_copy(update={"cases": cases}))
    assert made.cases == 6
    assert made.digest == measure(manifest.model_copy(update={"cases": manifest.cases[:6]})).digest
    with pytest.raises(DataError, match="outside of the test split"):
        measure(manifest.model_copy(update={"cases": cases[6:]}))


def test_the_digest_is_of_contents_not_of_names(tmp_path: Path) -> None:
    manifest = build_manifest("phantom://ct-lesions?cases=3&size=24")
    digest = measure(manifest).digest
    assert measure(build_manifest(str(write_phantom("ct-lesions", tmp_path, cases=3, size=24)))).digest == digest
    assert measure(build_manifest("phantom://ct-lesions?cases=3&size=24&seed=1")).digest != digest
    other = (
        tuple(c.model_copy(update={"mask": manifest.cases[0].mask}) for c in manifest.cases[:1]) + manifest.cases[1:]
    )
    assert measure(manifest.model_copy(update={"cases": other})).digest == digest
    films = build_manifest("phantom://xray-nodules?cases=2&size=16")
    flipped = tuple(c.model_copy(update={"label": 1 - int(c.label == 1)}) for c in films.cases)
    assert measure(films).digest != measure(films.model_copy(update={"cases": flipped})).digest


def test_empty_masks_fall_back_on_whole_images(tmp_path: Path) -> None:
    import nibabel

    table = write_phantom("ct-lesions", tmp_path, cases=2, size=24)
    for path in (tmp_path / "masks").iterdir():
        old = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(old.shape, np.uint8), old.affine), path)
    made = measure(build_manifest(str(table)))
    assert made.intensity[0].p005 < -900
    assert made.class_cases["lesion"] == 0


def test_it_is_the_same_again_and_survives_a_file(tmp_path: Path) -> None:
    manifest = build_manifest("phantom://mr-lesions?cases=3&size=24")
    made = measure(manifest)
    assert measure(manifest) == made
    made.save(tmp_path / "sub" / "fingerprint.json")
    assert Fingerprint.load(tmp_path / "sub" / "fingerprint.json") == made


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": 2}'])
def test_a_file_that_is_no_fingerprint(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fingerprint.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"fingerprint\.json.*medray plan"):
        Fingerprint.load(path)
    with pytest.raises(DataError, match="medray plan"):
        Fingerprint.load(tmp_path / "gone.json")


def test_real_volumes(shared_data: Path) -> None:
    manifest = build_manifest(str(shared_data / "msd_hippocampus"))
    made = measure(manifest)
    assert made.cases == 208
    assert made.shape_median == (35, 50, 36)
    assert made.spacing_median == (1.0, 1.0, 1.0)
    assert made.class_cases["Anterior (L1)"] == 208
