"""What holds for every reader: dispatch, cases, and damaged files."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from benchmarks.bad_input import Seed, attempt, mutant, seeds
from medray.data.manifest import Case
from medray.data.readers import probe, read_case, read_image, read_mask
from medray.errors import MedrayError, UnreadableError

SOUND = ["a.png", "b.jpg", "c.tif", "d.gif", "e.bmp", "scan.nii.gz", "scan.nii", "slice.dcm", "jpeg.dcm", "f.npz"]


@pytest.fixture()
def sound(tmp_path, volume, save_nifti, save_slice) -> Path:
    """One sound file of each format, as :data:`SOUND`."""
    grey = np.random.default_rng(0).integers(0, 256, (16, 20), np.uint8)
    for name in SOUND[:5]:
        Pillow.fromarray(grey).save(tmp_path / name)
    save_nifti(volume)
    save_nifti(volume, name="scan.nii")
    save_slice(grey.astype(np.uint16))
    np.savez_compressed(tmp_path / "f.npz", images=grey[None])
    import pydicom

    data = pydicom.dcmread(save_slice(grey, name="jpeg.dcm"))
    data.PixelData = pydicom.encaps.encapsulate([(tmp_path / "b.jpg").read_bytes()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.save_as(tmp_path / "jpeg.dcm", enforce_file_format=True)
    return tmp_path


def member(name: str) -> str:
    return "images/0" if name.endswith(".npz") else ""


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read(sound, name):
    outcome = attempt(sound / name, member(name))
    assert outcome.read
    assert outcome.wrong == ()


@pytest.mark.parametrize("name", SOUND)
def test_damage_never_escapes(sound, tmp_path_factory, name):
    """Some 30 mutants of each format: an image, or a MedrayError that names file and cause."""
    rng, others = random.Random(name), [(sound / other).read_bytes() for other in SOUND]
    for _ in range(30):
        folder = tmp_path_factory.mktemp("mutant")
        damage, path = mutant(Seed(path=sound / name, kind="x"), rng, rng.choice(others), folder)
        outcome = attempt(path, member(name))
        assert outcome.wrong == (), damage
        assert outcome.seconds < 20, damage


def test_damage_to_real_files_never_escapes(shared_data, tmp_path_factory):
    """The quick version of ``benchmarks/bad_input.py``: its mutants, in this process."""
    rng, found = random.Random(1), seeds(shared_data)
    assert {seed.kind for seed in found} == {"picture", "nifti", "dicom", "series", "npz"}
    refused = 0
    for _ in range(100):
        seed, other = rng.choice(found), rng.choice(found)
        damage, path = mutant(seed, rng, other.path.read_bytes(), tmp_path_factory.mktemp("mutant"))
        outcome = attempt(path, seed.member)
        assert outcome.wrong == (), (seed, damage)
        refused += not outcome.read
    assert refused > 30


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.sampled_from([*SOUND, "g.tiff", "h.hdr", "none", "x.npz"]))
def test_any_bytes_under_any_name(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    outcome = attempt(tmp_path / name, member(name))
    assert outcome.wrong == ()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(SOUND), at=st.floats(0, 1), block=st.binary(min_size=1, max_size=8))
def test_any_block_anywhere_in_a_header(sound, name, at, block):
    data = (sound / name).read_bytes()
    start = int(at * min(len(data), 700))
    damaged = data[:start] + block + data[start + len(block) :]
    path = sound / f"damaged{''.join(Path(name).suffixes)}"
    path.write_bytes(damaged)
    outcome = attempt(path, member(name))
    assert outcome.wrong == ()


@pytest.mark.parametrize(
    ("reference", "cause"),
    [
        ("missing.png", "no such file"),
        ("missing.nii.gz", "no such file"),
        ("https://example.org/a.png", "download"),
        ("", "empty path"),
        ("a\0b.png", "NUL"),
        ("x" * 5000, "can't be read"),
        ("notes.txt", "no known format"),
        ("a.png#3", "neither"),
        ("empty", "no DICOM image"),
    ],
)
def test_references_that_name_no_image(sound, reference, cause):
    (sound / "notes.txt").write_text("hello")
    (sound / "empty").mkdir()
    for read in (read_image, read_mask, probe):
        with pytest.raises(UnreadableError, match=cause) as caught:
            read(reference, sound)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_pipe_is_refused_before_it_can_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableError, match=r"pipe\.png: not a regular file"):
        read_image("pipe.png", tmp_path)


def test_a_name_may_hold_a_hash_and_a_path_may_be_absolute(sound):
    (sound / "a.png").rename(sound / "a#1.png")
    assert read_image("a#1.png", sound).shape == (16, 20)
    assert read_image(str(sound / "a#1.png"), Path("/nowhere")).shape == (16, 20)


def test_a_case_stacks_its_images_as_channels(sound, volume, save_nifti):
    save_nifti(volume + 1, "LPS", "t2.nii.gz")
    save_nifti((volume > 50).astype(np.uint8), name="mask.nii.gz")
    with pytest.raises(UnreadableError, match=r"t2\.nii\.gz: its grid lies"):
        read_case(Case(id="x", images=("scan.nii.gz", "t2.nii.gz")), sound)
    save_nifti(volume + 1, name="t2.nii.gz")
    case = Case(id="x", images=("scan.nii.gz", "t2.nii.gz"), mask="mask.nii.gz", valid="mask.nii.gz")
    image, mask, valid = read_case(case, sound)
    np.testing.assert_array_equal(image.array, np.stack([volume, volume + 1]))
    np.testing.assert_array_equal(mask.array, volume > 50)
    assert valid is not None
    assert image.original["path"].endswith("scan.nii.gz")


def test_images_or_masks_of_another_shape_are_refused(sound):
    with pytest.raises(UnreadableError, match=r"scan\.nii\.gz: shape \(4, 5, 6\) differs from \(16, 20\)"):
        read_case(Case(id="x", images=("a.png", "scan.nii.gz")), sound)
    with pytest.raises(UnreadableError, match=r"scan\.nii\.gz: the mask has shape \(4, 5, 6\)"):
        read_case(Case(id="x", images=("a.png",), mask="scan.nii.gz"), sound)


def test_phantoms_are_read_by_reference():
    from medray.data.phantoms import PHANTOMS

    name = next(name for name in PHANTOMS if "vessels" in name)
    reference = f"phantom://{name}?seed=0&index=1"
    image, mask, _ = read_case(Case(id="x", images=(reference,), mask=reference), Path())
    assert image.shape == mask.array.shape
    assert probe(reference, Path()).shape == image.shape


def test_the_errors_are_of_the_one_tree():
    assert issubclass(UnreadableError, MedrayError)
