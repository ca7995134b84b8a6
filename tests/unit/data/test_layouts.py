"""Each layout, made small on disk, to the cases it means; and what is said where it can't be."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from medray.data.layouts import build_manifest
from medray.data.layouts.base import natural, numbered_names, unique_ids
from medray.data.manifest import Manifest
from medray.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def png(path: Path, *, mask: int | None = None, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size, size), dtype=np.uint8)
    if mask is not None:
        pixels = np.zeros((size, size), np.uint8)
        pixels[2:4] = mask
    Picture.fromarray(pixels).save(path)
    return path


def nifti(path: Path, *, mask: int | None = None, shape: tuple[int, ...] = (6, 5, 4)) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 100, shape).astype(np.int16)
    if mask is not None:
        array = np.zeros(shape, np.uint8)
        array[1:3] = mask
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 2, 1])), path)
    return path


def dicom(path: Path, *, series: str, patient: str, instance: int) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"{series}.{instance}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{series}.{instance}"
    data.SeriesInstanceUID, data.StudyInstanceUID, data.PatientID, data.Modality = series, "1.2.9", patient, "CT"
    data.Rows, data.Columns, data.BitsAllocated, data.BitsStored, data.HighBit = 6, 5, 16, 16, 15
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [1, 1], 2, instance
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2 * instance]
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = RNG.integers(0, 2000, (6, 5), dtype=np.uint16).tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def table(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class TestFolders:
    def test_a_folder_per_class(self, tmp_path: Path) -> None:
        for name in ("ill/2", "ill/10", "well/1"):
            png(tmp_path / f"{name}.png")
        manifest = build_manifest(str(tmp_path))
        assert (manifest.task, manifest.ndim, manifest.channels) == ("classification", 2, 1)
        assert manifest.classes == ("ill", "well")
        assert [(c.id, c.label, c.images[0]) for c in manifest.cases] == [
            ("2", 0, "ill/2.png"),
            ("10", 0, "ill/10.png"),
            ("1", 1, "well/1.png"),
        ]
        assert Path(manifest.root) == tmp_path

    def test_a_folder_per_class_under_splits_with_equal_names(self, tmp_path: Path) -> None:
        for split in ("train", "val", "test"):
            for name in ("a", "b"):
                png(tmp_path / split / name / "1.png")
        manifest = build_manifest(str(tmp_path))
        assert [c.split for c in manifest.cases] == ["train", "train", "val", "val", "test", "test"]
        assert len({c.id for c in manifest.cases}) == 6
        assert manifest.cases[0].id == "train__a__1"

    def test_volumes_and_nested_folders(self, tmp_path: Path) -> None:
        nifti(tmp_path / "a" / "p1" / "scan.nii.gz")
        nifti(tmp_path / "b" / "p2" / "scan.nii.gz")
        manifest = build_manifest(str(tmp_path))
        assert manifest.ndim == 3
        assert [c.id for c in manifest.cases] == ["a__p1__scan", "b__p2__scan"]

    def test_images_beside_masks(self, tmp_path: Path) -> None:
        for name in ("scan1", "scan2"):
            png(tmp_path / "images" / f"{name}.png")
            png(tmp_path / "masks" / f"{name}_mask.png", mask=255)
        png(tmp_path / "masks" / "scan9_mask.png", mask=255)
        manifest = build_manifest(str(tmp_path))
        assert (manifest.task, manifest.classes) == ("segmentation", ("background", "foreground"))
        assert manifest.cases[1].mask == "masks/scan2_mask.png"
        assert [(f.rule, f.severity) for f in manifest.findings] == [("unpaired", "warning")]
        assert "scan9_mask.png" in manifest.findings[0].message

    def test_images_beside_masks_under_splits_with_regions(self, tmp_path: Path) -> None:
        for split in ("training", "test"):
            png(tmp_path / split / "images" / "01.png")
            png(tmp_path / split / "masks" / "01.png", mask=2)
            png(tmp_path / split / "fov" / "01_fov.png", mask=1)
        (tmp_path / "classes.json").write_text('["background", "vein", "artery"]')
        manifest = build_manifest(str(tmp_path))
        assert manifest.classes == ("background", "vein", "artery")
        assert [c.split for c in manifest.cases] == ["train", "test"]
        assert manifest.cases[0].valid == "training/fov/01_fov.png"

    def test_two_folders_that_could_be_the_masks_are_not_guessed_at(self, tmp_path: Path) -> None:
        for name in ("images", "mask", "1st_manual"):
            png(tmp_path / name / "1.png", mask=1)
        with pytest.raises(DataError, match="1st_manual and mask could both hold the masks"):
            build_manifest(str(tmp_path))

    def test_labels_are_found_in_all_masks(self, tmp_path: Path) -> None:
        for name, value in (("a", 1), ("b", 3), ("c", 255)):
            png(tmp_path / "images" / f"{name}.png")
            nothing = np.zeros((8, 8), np.uint8)
            nothing[0, 0], nothing[1, 1] = value, 1
            (tmp_path / "masks").mkdir(exist_ok=True)
            Picture.fromarray(nothing).save(tmp_path / "masks" / f"{name}.png")
        assert build_manifest(str(tmp_path)).classes == ("background", "label_1", "label_2", "label_3")

    def test_masks_that_match_nothing(self, tmp_path: Path) -> None:
        png(tmp_path / "images" / "a.png")
        png(tmp_path / "masks" / "b.png", mask=1)
        with pytest.raises(DataError, match="no image has a mask of its name"):
            build_manifest(str(tmp_path))


class TestTable:
    def test_labels_patients_sites_splits_and_clinical_columns(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            png(tmp_path / f"{name}.png")
        source = table(
            tmp_path / "cases.csv",
            "image;label;patient;site;split;age;smoker",
            "a.png;10;P1;north;training;61.5;no",
            "b.png;2.0;P1;north;training;;yes",
            "c.png;10;P2;;test;nan;no",
        )
        for way in (source, str(tmp_path)):
            manifest = build_manifest(way)
            assert manifest.classes == ("2", "10")
            assert [c.label for c in manifest.cases] == [1, 0, 1]
            assert [c.split for c in manifest.cases] == ["train", "train", "test"]
            assert [c.site for c in manifest.cases] == ["north", "north", None]
            assert manifest.cases[0].columns == {"age": 61.5, "smoker": "no"}
            assert manifest.cases[1].columns["age"] is None
            assert manifest.cases[0].group == "P1"

    def test_several_labels_in_one_cell(self, tmp_path: Path) -> None:
        for name in "abc":
            png(tmp_path / f"{name}.png")
        source = table(tmp_path / "t.csv", "image,label", "a.png,mass|fluid", "b.png,", "c.png,fluid")
        manifest = build_manifest(source)
        assert (manifest.task, manifest.classes) == ("multilabel", ("fluid", "mass"))
        assert [c.label for c in manifest.cases] == [(1, 1), (0, 0), (1, 0)]

    def test_several_columns_of_0_and_1(self, tmp_path: Path) -> None:
        png(tmp_path / "a.png")
        source = table(tmp_path / "t.csv", "image,label_mass,label_fluid,note", "a.png,1,0.0,x")
        manifest = build_manifest(source)
        assert (manifest.task, manifest.classes, manifest.cases[0].label) == ("multilabel", ("mass", "fluid"), (1, 0))
        assert manifest.cases[0].columns == {"note": "x"}
        bad = table(tmp_path / "t.csv", "image,label_mass,label_fluid", "a.png,1,")
        with pytest.raises(DataError, match="row 2: label_fluid='' must be 0 or 1"):
            build_manifest(bad)

    def test_masks_regions_and_channels(self, tmp_path: Path) -> None:
        for name in ("t1", "t2"):
            nifti(tmp_path / f"{name}.nii.gz")
        nifti(tmp_path / "m.nii.gz", mask=2)
        nifti(tmp_path / "v.nii.gz", mask=1)
        source = table(tmp_path / "t.csv", "image_t1,image_t2,mask,valid", "t1.nii.gz,t2.nii.gz,m.nii.gz,v.nii.gz")
        manifest = build_manifest(source)
        assert (manifest.task, manifest.channels, len(manifest.classes)) == ("segmentation", 2, 3)
        assert manifest.cases[0].images == ("t1.nii.gz", "t2.nii.gz")
        assert manifest.cases[0].valid == "v.nii.gz"

    def test_columns_of_other_names_are_named_behind_the_path(self, tmp_path: Path) -> None:
        png(tmp_path / "images" / "x1.png")
        source = table(tmp_path / "t.csv", "image_id,dx,lesion,age", "x1,nv,L1,3")
        manifest = build_manifest(f"{source}?image=image_id&label=dx&patient=lesion")
        case = manifest.cases[0]
        assert (case.images, case.patient, case.columns) == (("images/x1.png",), "L1", {"age": 3.0})
        with pytest.raises(DataError, match="did you mean 'lesion'"):
            build_manifest(f"{source}?image=image_id&label=dx&patient=lesio")
        with pytest.raises(DataError, match="did you mean 'label'"):
            build_manifest(f"{source}?image=image_id&lable=dx")

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        png(tmp_path / "a.png")
        png(tmp_path / "b.png")
        columns = {"image": ["a.png", "b.png"], "label": [1, 0], "fit": [True, False], "age": [70.0, None]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "cases.parquet")
        manifest = build_manifest(str(tmp_path))
        assert [c.label for c in manifest.cases] == [1, 0]
        assert manifest.cases[1].columns == {"fit": 0.0, "age": None}

    def test_the_task_decides_where_both_mask_and_label_are_given(self, tmp_path: Path) -> None:
        png(tmp_path / "a.png")
        png(tmp_path / "m.png", mask=255)
        source = table(tmp_path / "t.csv", "image,mask,label", "a.png,m.png,ill")
        assert build_manifest(source).task == "segmentation"
        manifest = build_manifest(source, task="classification")
        assert (manifest.task, manifest.cases[0].label, manifest.cases[0].mask) == ("classification", 0, None)

    def test_a_missing_file_is_kept_for_the_checks(self, tmp_path: Path) -> None:
        png(tmp_path / "a.png")
        source = table(tmp_path / "t.csv", "image,label", "gone.png,x", "a.png,y")
        assert build_manifest(source).cases[0].images == ("gone.png",)

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            (["picture,label", "a.png,1"], "no column 'image'"),
            (["image,label"], "no rows"),
            (["image,age", "a.png,3"], "no column 'mask', 'label'"),
            (["image,label,split", "a.png,1,sometimes"], "row 2: split='sometimes'"),
            (["image,label,split", "a.png,1,train", "a.png,1,"], "row 3: split=''"),
            (["image,label", "a.png,1,2"], "line 2 has 3 cells"),
            (["image,label,label", "a.png,1,2"], "'label' stands twice"),
            (["image,label", ",1"], "row 2 names no image"),
        ],
    )
    def test_what_is_wrong_with_a_table_is_named(self, tmp_path: Path, lines: list[str], said: str) -> None:
        png(tmp_path / "a.png")
        with pytest.raises(DataError, match=said):
            build_manifest(table(tmp_path / "t.csv", *lines))

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00image", b'image,label\n"a.png,1\n', b"", b"PAR1 no parquet"])
    def test_a_file_that_is_no_table(self, tmp_path: Path, content: bytes) -> None:
        for suffix in (".csv", ".parquet"):
            (tmp_path / f"t{suffix}").write_bytes(content)
            with pytest.raises(DataError, match=f"t{suffix}"):
                build_manifest(str(tmp_path / f"t{suffix}"))

    def test_cells_that_no_path_can_be(self, tmp_path: Path) -> None:
        png(tmp_path / "a.png")
        long = "9" * 6000
        source = table(tmp_path / "t.csv", "image,label,age", "a.png,x,1_000", f"{long},{long},nan", "²/\x01,²,inf")
        manifest = build_manifest(source)
        assert len(manifest.cases) == 3
        assert [c.columns["age"] for c in manifest.cases] == ["1_000", None, "inf"]
        with pytest.raises(DataError, match="there is no such file"):
            build_manifest(long)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        content=st.one_of(st.binary(max_size=300), st.text('image,label|;\t"\n\r01ab', max_size=200).map(str.encode))
    )
    def test_any_bytes_are_a_table_or_an_error_of_ours(self, tmp_path: Path, content: bytes) -> None:
        for name in ("t.csv", "t.parquet", "dataset.json", "t.npz"):
            (tmp_path / name).write_bytes(content)
            with contextlib.suppress(DataError):
                build_manifest(str(tmp_path / name))


class TestDatasetJson:
    def test_msd(self, tmp_path: Path) -> None:
        for name in ("h_001", "h_003"):
            nifti(tmp_path / "imagesTr" / f"{name}.nii.gz")
            nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", mask=1)
        spec = {
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "head", "3": "tail"},
            "training": [
                {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("h_001", "h_003")
            ],
            "test": ["./imagesTs/h_002.nii.gz"],
        }
        (tmp_path / "dataset.json").write_text(json.dumps(spec))
        manifest = build_manifest(str(tmp_path))
        assert (manifest.modality, manifest.ndim) == ("MR", 3)
        assert manifest.classes == ("background", "head", "label_2", "tail")
        assert [(c.id, c.images[0], c.mask) for c in manifest.cases][1] == (
            "h_003",
            "imagesTr/h_003.nii.gz",
            "labelsTr/h_003.nii.gz",
        )
        assert {c.split for c in manifest.cases} == {None}
        (tmp_path / "split.json").write_text('{"train": ["h_003"], "test": ["h_001"]}')
        assert [c.split for c in build_manifest(str(tmp_path / "dataset.json")).cases] == ["test", "train"]
        (tmp_path / "split.json").write_text('{"train": ["h_003"], "test": []}')
        with pytest.raises(DataError, match="stand in no split, first 'h_001'"):
            build_manifest(str(tmp_path))

    def test_nnunet(self, tmp_path: Path) -> None:
        for name in ("c_2", "c_10"):
            for channel in ("0000", "0001"):
                nifti(tmp_path / "imagesTr" / f"{name}_{channel}.nii.gz")
            nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", mask=1)
        nifti(tmp_path / "imagesTs" / "c_3_0000.nii.gz")
        nifti(tmp_path / "imagesTs" / "c_3_0001.nii.gz")
        nifti(tmp_path / "labelsTs" / "c_3.nii.gz", mask=1)
        spec = {
            "channel_names": {"0": "CT", "1": "CT"},
            "labels": {"background": 0, "tumour": 1},
            "file_ending": ".nii.gz",
        }
        (tmp_path / "dataset.json").write_text(json.dumps(spec))
        manifest = build_manifest(str(tmp_path))
        assert (manifest.modality, manifest.channels, manifest.classes) == ("CT", 2, ("background", "tumour"))
        assert [(c.id, c.split) for c in manifest.cases] == [("c_2", "train"), ("c_10", "train"), ("c_3", "test")]
        assert manifest.cases[0].images == ("imagesTr/c_2_0000.nii.gz", "imagesTr/c_2_0001.nii.gz")

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            ({"background": 0, "whole": [1, 2]}, "is a region"),
            ({"background": 0, "ignore": 2}, "write 255"),
            ({"background": 0, "a": 1, "b": 1}, "a number of its own"),
            ({"a": "x"}, "such as 'lesion': 1"),
            ({"a": 300}, "at most 254"),
        ],
    )
    def test_labels_that_cannot_be(self, labels: dict[str, object], said: str) -> None:
        with pytest.raises(DataError, match=said):
            numbered_names(labels, Path("dataset.json"))

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"labels": {"a": 0}}', '{"labels": {"a": 0}, "training": [3]}']
    )
    def test_a_dataset_json_that_is_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=r"dataset\.json"):
            build_manifest(str(tmp_path))


class TestDicom:
    def tree(self, root: Path) -> None:
        """Two series in folders of their own, two that share one, in files whose names say nothing."""
        for k in range(3):
            dicom(root / "p1" / "s1" / f"x{9 - k}", series="1.2.1", patient="P1", instance=k)
            dicom(root / "p2" / "s2" / f"y{k}.dcm", series="1.2.2", patient="P2", instance=k)
            dicom(root / "p3" / f"z{k}", series="1.2.3", patient="P3", instance=k)
            dicom(root / "p3" / f"w{k}", series="1.2.4", patient="P3", instance=k)

    def test_a_table_that_names_series(self, tmp_path: Path) -> None:
        self.tree(tmp_path)
        table(tmp_path / "labels.csv", "image,label", "p1/s1,ill", "1.2.2,well", "1.2.4,ill")
        manifest = build_manifest(str(tmp_path))
        assert [c.images[0] for c in manifest.cases] == ["p1/s1", "p2/s2", "p3#1.2.4"]
        assert [c.patient for c in manifest.cases] == ["P1", "P2", "P3"]
        assert (manifest.ndim, manifest.modality) == (3, "CT")

    def test_a_table_of_patients(self, tmp_path: Path) -> None:
        self.tree(tmp_path)
        table(tmp_path / "patients.csv", "patient,label,site", "P1,ill,a", "P3,well,b")
        manifest = build_manifest(str(tmp_path))
        assert [(c.images[0], c.label, c.site) for c in manifest.cases] == [
            ("p1/s1", 0, "a"),
            ("p3#1.2.4", 1, "b"),
            ("p3#1.2.3", 1, "b"),
        ]

    def test_a_folder_per_class(self, tmp_path: Path) -> None:
        self.tree(tmp_path)
        manifest = build_manifest(str(tmp_path))
        assert manifest.classes == ("p1", "p2", "p3")
        assert [c.label for c in manifest.cases] == [0, 1, 2, 2]
        assert manifest.cases[0].patient == "P1"


class TestMedMnist:
    def arrays(self, **more: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {}
        for split, count in (("train", 6), ("val", 2), ("test", 3)):
            arrays[f"{split}_images"] = RNG.integers(0, 256, (count, 9, 9), dtype=np.uint8)
            arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 3
        return {**arrays, **more}

    def test_classes_and_given_splits(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "toy.npz", **self.arrays())
        for source in (tmp_path, tmp_path / "toy.npz"):
            manifest = build_manifest(str(source))
            assert (manifest.task, manifest.ndim, manifest.classes) == ("classification", 2, ("0", "1", "2"))
            assert len(manifest.cases) == 11
            assert manifest.cases[7].model_dump(include={"id", "images", "label", "split"}) == {
                "id": "val-1",
                "images": ("toy.npz#val_images/1",),
                "label": 1,
                "split": "val",
            }

    def test_findings(self, tmp_path: Path) -> None:
        flags = {f"{s}_labels": RNG.integers(0, 2, (n, 4)) for s, n in (("train", 6), ("val", 2), ("test", 3))}
        np.savez(tmp_path / "toy.npz", **self.arrays(**flags))
        manifest = build_manifest(str(tmp_path / "toy.npz"))
        assert manifest.task == "multilabel"
        assert manifest.cases[0].label == tuple(flags["train_labels"][0])

    def test_pickled_objects_are_not_read(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "toy.npz", **self.arrays(train_labels=np.array([{}] * 6, dtype=object)))
        with pytest.raises(DataError, match=r"toy\.npz"):
            build_manifest(str(tmp_path / "toy.npz"))

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text"])
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "toy.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"toy\.npz"):
            build_manifest(str(tmp_path / "toy.npz"))

    def test_labels_missing(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "toy.npz", train_images=np.zeros((2, 4, 4), np.uint8))
        with pytest.raises(DataError, match="train_labels"):
            build_manifest(str(tmp_path / "toy.npz"))


class TestSources:
    @pytest.mark.parametrize("make", ["missing", "empty", "pictures only", "text"])
    def test_what_is_no_data_set_gets_told_what_is(self, tmp_path: Path, make: str) -> None:
        source = tmp_path / "data"
        if make == "empty":
            source.mkdir()
        elif make == "pictures only":
            png(source / "a.png")
        elif make == "text":
            source = tmp_path / "notes.txt"
            source.write_text("x")
        with pytest.raises(DataError, match="a folder per class"):
            build_manifest(str(source))

    def test_a_manifest_is_a_source(self, tmp_path: Path) -> None:
        made = build_manifest("phantom://xray-nodules?cases=3")
        made.save(tmp_path / "manifest.json")
        assert build_manifest(str(tmp_path / "manifest.json")) == made

    def test_a_task_that_the_layout_cannot_give(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"task\.kind=segmentation"):
            build_manifest("phantom://xray-nodules", task="segmentation")
        png(tmp_path / "a" / "1.png")
        png(tmp_path / "b" / "1.png")
        with pytest.raises(DataError, match=r"task\.kind=segmentation"):
            build_manifest(str(tmp_path), task="segmentation")

    def test_not_one_readable_image(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / "1.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match="none of 2 images can be read"):
            build_manifest(str(tmp_path))

    def test_names_in_other_scripts_and_with_spaces(self, tmp_path: Path) -> None:
        for name in ("gesund, ja", "geschwür 腫瘍"):
            png(tmp_path / name / "bild 1~(2).png")
        manifest = build_manifest(str(tmp_path))
        assert manifest.classes == ("geschwür 腫瘍", "gesund, ja")


def test_ids_and_order() -> None:
    assert sorted(["c10", "c2", "a"], key=natural) == ["a", "c2", "c10"]
    assert unique_ids([("a", "x/a"), ("b", "x/b")]) == ["a", "b"]
    assert unique_ids([("a", "x/a"), ("a", "y/a")]) == ["x__a", "y__a"]
    assert unique_ids([("a", "x/a"), ("a", "x/a")]) == ["x__a-0", "x__a-1"]


def test_real_data_sets(shared_data: Path) -> None:
    hippocampus = build_manifest(str(shared_data / "msd_hippocampus"))
    assert (len(hippocampus.cases), hippocampus.modality, hippocampus.channels) == (260, "MR", 1)
    assert sum(c.split == "test" for c in hippocampus.cases) == 52
    skin = build_manifest(
        f"{shared_data}/fed_isic_ham/cases.csv?image=image_id&label=dx&patient=lesion_id&site=fed_center"
    )
    assert (len(skin.cases), len(skin.classes), skin.channels) == (5984, 7, 3)
    assert isinstance(skin, Manifest) and skin.cases[0].columns["localization"] == "trunk"
    breast = build_manifest(str(shared_data / "medmnist" / "breastmnist.npz"))
    assert len(breast.cases) == 780


class TestGrades:
    """Ordinal: the same layouts as of classes, and an order that has to come from somewhere."""

    def test_a_table_of_numbers_has_the_grades_between_them_too(self, tmp_path: Path) -> None:
        for number in range(3):
            png(tmp_path / f"{number}.png")
        table = tmp_path / "cases.csv"
        table.write_text("image,label\n0.png,4\n1.png,0\n2.png,2\n")
        found = build_manifest(str(table), task="ordinal")
        assert (found.task, found.classes) == ("ordinal", ("0", "1", "2", "3", "4"))
        assert [case.label for case in found.cases] == [4, 0, 2]
        assert build_manifest(str(table)).task == "classification", "who doesn't ask gets classes"

    def test_words_are_ordered_by_classes_json_alone(self, tmp_path: Path) -> None:
        for name in ("severe", "mild", "none"):
            png(tmp_path / name / f"{name}.png")
        with pytest.raises(DataError, match=r"mild, none, severe have no order.*classes\.json"):
            build_manifest(str(tmp_path), task="ordinal")
        (tmp_path / "classes.json").write_text('["none", "mild", "severe"]')
        found = build_manifest(str(tmp_path), task="ordinal")
        assert found.classes == ("none", "mild", "severe")
        assert {case.id: case.label for case in found.cases} == {"none": 0, "mild": 1, "severe": 2}

    def test_a_folder_for_each_grade_is_read_in_their_order(self, tmp_path: Path) -> None:
        for grade in (10, 9, 7):
            png(tmp_path / f"grade{grade}" / f"film{grade}.png")
        found = build_manifest(str(tmp_path), task="ordinal")
        assert found.classes == ("grade7", "grade8", "grade9", "grade10")
        assert {case.id: case.label for case in found.cases} == {"film7": 0, "film9": 2, "film10": 3}
        assert build_manifest(str(tmp_path)).classes == ("grade7", "grade9", "grade10")

    def test_a_dicom_tree_by_patients(self, tmp_path: Path) -> None:
        for number, patient in enumerate(("A", "B")):
            dicom(tmp_path / patient / "1.dcm", series=f"1.2.{number}", patient=patient, instance=0)
        (tmp_path / "grades.csv").write_text("patient,label\nA,mild\nB,none\n")
        with pytest.raises(DataError, match="have no order"):
            build_manifest(str(tmp_path), task="ordinal")
        (tmp_path / "classes.json").write_text('["none", "mild", "severe"]')
        found = build_manifest(str(tmp_path), task="ordinal")
        assert [(case.patient, case.label) for case in found.cases] == [("A", 1), ("B", 0)]
        (tmp_path / "classes.json").write_text('["none", "severe"]')
        with pytest.raises(DataError, match=r"label 'mild' is not in classes\.json"):
            build_manifest(str(tmp_path), task="ordinal")

    def test_a_phantom_may_be_learnt_as_another_task_of_the_same_targets(self) -> None:
        graded = build_manifest("phantom://xray-effusion?cases=4")
        assert graded.task == "ordinal" and graded.classes == ("none", "small", "moderate", "large")
        classified = build_manifest("phantom://xray-effusion?cases=4", task="classification")
        assert classified == graded.model_copy(update={"task": "classification"})

    def test_an_unknown_task_is_refused_before_anything_is_read(self) -> None:
        with pytest.raises(ConfigError, match=r"no task 'ordinl'\. Did you mean 'ordinal'"):
            build_manifest("nowhere/at/all", task="ordinl")
