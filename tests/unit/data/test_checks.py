"""Checks: one thing is broken at a time, and the finding names it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medray.data.checks import check, require_sound
from medray.data.layouts import build_manifest
from medray.data.manifest import Case, Finding, Manifest
from medray.data.phantoms import write_phantom
from medray.errors import DataError, LeakError
from medray.workflows.check import check_data


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("volumes")
    return build_manifest(str(write_phantom("ct-lesions", directory, cases=6, size=24)))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = tmp_path_factory.mktemp("films")
    return build_manifest(str(write_phantom("xray-nodules", directory, cases=8, size=16)))


def changed(manifest: Manifest, index: int, **update: object) -> Manifest:
    cases = list(manifest.cases)
    cases[index] = Case.model_validate({**cases[index].model_dump(), **update})
    return manifest.model_copy(update={"cases": tuple(cases)})


def rules(manifest: Manifest) -> set[tuple[str, str, str | None]]:
    return {(f.rule, f.severity, f.case) for f in check(manifest).findings}


def rewrite(manifest: Manifest, path: str, array: np.ndarray, affine: np.ndarray | None = None, name: str = "x") -> str:
    """Another NIfTI beside the image at ``path``."""
    import nibabel

    old = nibabel.load(Path(manifest.root) / path)
    new = f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, old.affine if affine is None else affine), Path(manifest.root) / new)
    return new


@pytest.mark.parametrize("source", ["ct-lesions", "mr-lesions", "fundus-vessels", "xray-findings", "ct-nodule-type"])
def test_sound_data_have_no_findings(source: str) -> None:
    steps: list[int] = []
    manifest = check(build_manifest(f"phantom://{source}?cases=16"), progress=lambda done, *_: steps.append(done))
    assert manifest.findings == ()
    assert steps == list(range(1, 17))
    require_sound(manifest, strict=True)


def test_unreadable(volumes: Manifest) -> None:
    (Path(volumes.root) / "bad.nii.gz").write_bytes(b"\x1f\x8b no gzip")
    assert ("unreadable", "error", volumes.cases[1].id) in rules(changed(volumes, 1, images=("bad.nii.gz",)))
    assert ("unreadable", "error", volumes.cases[2].id) in rules(changed(volumes, 2, images=("gone.nii.gz",)))
    broken = check(changed(volumes, 3, mask="bad.nii.gz"))
    assert ("unreadable", volumes.cases[3].id) in {(f.rule, f.case) for f in broken.findings}
    with pytest.raises(DataError, match=r"unreadable \[.*bad\.nii\.gz"):
        require_sound(broken)


def test_constant(volumes: Manifest) -> None:
    shape = (21, 21, 16)
    name = rewrite(volumes, volumes.cases[0].images[0], np.full(shape, 7, np.int16))
    found = rules(changed(volumes, 0, images=(name,), mask=None))
    assert ("constant", "warning", volumes.cases[0].id) in found


def test_not_finite(volumes: Manifest) -> None:
    array = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32)
    array[0, 0, 0] = np.nan
    one = rewrite(volumes, volumes.cases[0].images[0], array)
    assert ("nonfinite", "warning", volumes.cases[0].id) in rules(changed(volumes, 0, images=(one,), mask=None))
    none = rewrite(volumes, volumes.cases[0].images[0], np.full((6, 6, 6), np.nan, np.float32))
    assert {r for r, _, c in rules(changed(volumes, 0, images=(none,), mask=None)) if c == volumes.cases[0].id} & {
        "empty",
        "unreadable",
    }


def test_mask_of_other_geometry(volumes: Manifest) -> None:
    import nibabel

    case = volumes.cases[0]
    assert case.mask is not None
    old = nibabel.load(Path(volumes.root) / case.mask)
    labels = np.asarray(old.dataobj).astype(np.uint8)
    expected = ("geometry", "error", case.id)
    assert expected in rules(changed(volumes, 0, mask=rewrite(volumes, case.mask, labels[1:])))
    moved = old.affine.copy()
    moved[0, 3] += 30
    assert expected in rules(changed(volumes, 0, mask=rewrite(volumes, case.mask, labels, moved)))
    wide = old.affine.copy()
    wide[:3, :3] *= 1.1
    assert expected in rules(changed(volumes, 0, mask=rewrite(volumes, case.mask, labels, wide)))
    near = old.affine.copy()
    near[0, 3] += 0.01
    assert expected not in rules(changed(volumes, 0, mask=rewrite(volumes, case.mask, labels, near)))


def test_channels_of_other_geometry_and_number(volumes: Manifest) -> None:
    first, other = (
        volumes.cases[0].images[0],
        rewrite(volumes, volumes.cases[0].images[0], np.ones((5, 5, 5), np.int16)),
    )
    found = rules(changed(volumes, 0, images=(first, other)))
    assert ("geometry", "error", volumes.cases[0].id) in found
    assert ("shape", "error", volumes.cases[0].id) in found


def test_labels_out_of_range(volumes: Manifest, films: Manifest) -> None:
    import nibabel

    case = volumes.cases[0]
    assert case.mask is not None
    labels = np.asarray(nibabel.load(Path(volumes.root) / case.mask).dataobj).astype(np.uint8)
    labels[0, 0, 0], labels[0, 0, 1] = 9, 255
    found = check(changed(volumes, 0, mask=rewrite(volumes, case.mask, labels))).findings
    assert [(f.rule, f.severity, f.case) for f in found] == [("label-range", "error", case.id)]
    assert "[9]" in found[0].message
    assert ("label-range", "error", films.cases[1].id) in rules(changed(films, 1, label=2))


def test_targets_that_are_missing(films: Manifest, volumes: Manifest) -> None:
    assert ("target", "error", films.cases[0].id) in rules(changed(films, 0, label=None))
    assert ("target", "error", volumes.cases[0].id) in rules(changed(volumes, 0, mask=None))
    assert ("target", "warning", volumes.cases[0].id) in rules(changed(volumes, 0, mask=None, split="test"))


def test_duplicates_within_and_across_splits(films: Manifest) -> None:
    twice = changed(films, 5, images=films.cases[2].images)
    found = [f for f in check(twice).findings if f.rule == "duplicate"]
    assert len(found) == 1 and films.cases[2].id in found[0].message and films.cases[5].id in found[0].message
    assert "may fall on both sides" in found[0].message
    split = changed(changed(twice, 2, split="train"), 5, split="test")
    assert "stands in test and train" in next(f.message for f in check(split).findings if f.rule == "duplicate")
    other = {0: 1, 1: 0}[int(films.cases[2].label or 0)]
    labelled = next(f for f in check(changed(twice, 5, images=films.cases[2].images, label=other)).findings)
    assert "different labels" in labelled.message


def test_a_patient_in_two_splits_is_an_error(films: Manifest) -> None:
    cases = tuple(c.model_copy(update={"split": "train" if k < 5 else "val"}) for k, c in enumerate(films.cases))
    assert not [f for f in check(films.model_copy(update={"cases": cases})).findings if f.rule == "leak"]
    leaking = changed(films.model_copy(update={"cases": cases}), 7, patient=films.cases[0].patient)
    found = check(leaking)
    assert [(f.rule, f.severity) for f in found.findings if f.rule == "leak"] == [("leak", "error")]
    assert found.findings[0].rule == "leak", "errors stand first"
    with pytest.raises(LeakError, match=f"patient {films.cases[0].patient} stands in train"):
        require_sound(found)


def test_classes_without_cases(films: Manifest) -> None:
    more = films.model_copy(update={"classes": (*films.classes, "rare")})
    found = check(more).findings
    assert [(f.rule, f.severity) for f in found] == [("no-cases", "warning")]
    assert "'rare'" in found[0].message
    cases = tuple(c.model_copy(update={"split": "train" if c.label == 0 else "test"}) for c in films.cases)
    lacking = check(films.model_copy(update={"cases": cases}))
    assert ("no-cases", "error") in {(f.rule, f.severity) for f in lacking.findings}


def test_spacing_outliers(volumes: Manifest) -> None:
    import nibabel

    case = volumes.cases[4]
    old = nibabel.load(Path(volumes.root) / case.images[0])
    name = rewrite(volumes, case.images[0], np.asarray(old.dataobj), old.affine @ np.diag([1, 1, 8, 1]))
    found = [f for f in check(changed(volumes, 4, images=(name,), mask=None)).findings if f.rule == "spacing"]
    assert [f.case for f in found] == [case.id]
    assert "the median is" in found[0].message


def test_strict_makes_warnings_errors(films: Manifest) -> None:
    found = check(changed(films, 5, images=films.cases[2].images))
    require_sound(found)
    with pytest.raises(DataError, match="1 finding to resolve"):
        require_sound(found, strict=True)


def test_findings_of_the_layout_stay_and_others_are_made_anew(films: Manifest) -> None:
    old = (
        Finding(rule="unpaired", severity="warning", case=None, message="m", fix="f"),
        Finding(rule="constant", severity="warning", case=None, message="m", fix="f"),
    )
    found = check(films.model_copy(update={"findings": old}))
    assert Counter(f.rule for f in found.findings) == {"unpaired": 1}


def test_the_workflow_saves_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "manifest.json"
    made = check_data("phantom://xray-nodules?cases=4&size=16", path)
    assert Manifest.load(path) == made
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        check_data("phantom://xray-nodules?cases=4&size=16", tmp_path / "file" / "manifest.json")


def test_real_volumes_are_sound_and_published_pictures_stand_twice(shared_data: Path) -> None:
    hippocampus = build_manifest(str(shared_data / "msd_hippocampus"))
    some = hippocampus.model_copy(update={"cases": hippocampus.cases[:20]})
    assert not [f for f in check(some).findings if f.severity == "error"]
    pneumonia = check(build_manifest(str(shared_data / "medmnist" / "pneumoniamnist.npz")))
    assert {(f.rule, f.severity) for f in pneumonia.findings} == {("duplicate", "warning")}
    assert any("stands in train and val" in f.message for f in pneumonia.findings)
