"""The routes, without Ray: what a client sends, and what it gets."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import threading
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from medray import logs
from medray.bundle.read import Bundle
from medray.data.readers import read_image
from medray.engines.ray.serve.keys import add_key
from tests.unit.engines.ray.serve.samples import nifti_bytes, nii, npy, png, write_small, zipped


def audit(client: Any) -> list[dict[str, Any]]:
    path = Path(client.service.fleet.config.state) / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_picture_is_classified_as_offline(client, small_bundles, tmp_path) -> None:
    body = png()
    answer = client.post("/v1/predict", content=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (tmp_path / "a.png").write_bytes(body)
    bundle = Bundle.open(small_bundles["cls"])
    offline = bundle.predict(read_image("a.png", tmp_path))
    assert found["classes"] == [bundle.spec.classes[offline.decisions[0]]]
    assert found["probabilities"]["ill"] == pytest.approx(float(offline.probabilities[1]), abs=1e-5)
    p = np.array(list(found["probabilities"].values()))
    assert found["uncertainty"] == pytest.approx(float(-(p * np.log(p)).sum() / np.log(2)), abs=1e-4)
    assert found["model"]["name"] == "cls" and found["engine"] == "torch" and found["precision"] == "fp32"
    assert "Not a medical device" in found["intended_use"]
    assert set(found["seconds"]) >= {"read", "prepare", "network", "finish"}
    line = audit(client)[-1]
    assert line["input"] == hashlib.sha256(body).hexdigest()
    assert line["result"] == hashlib.sha256(answer.content).hexdigest()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA"])
def test_a_mask_lies_on_its_scan_whatever_the_orientation(client, small_bundles, tmp_path, codes) -> None:
    turn = nib.orientations.axcodes2ornt(codes)
    scan = nii().as_reoriented(nib.orientations.ornt_transform(turn, nib.io_orientation(np.eye(4))))
    answer = client.post("/v1/predict?model=seg", content=nifti_bytes(scan), headers={"Accept": "application/nifti"})
    assert answer.status_code == 200, answer.text
    (tmp_path / "mask.nii.gz").write_bytes(answer.content)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-4)
    nib.save(scan, tmp_path / "scan.nii.gz")
    offline = Bundle.open(small_bundles["seg"]).predict(read_image("scan.nii.gz", tmp_path))
    in_ras = nib.as_closest_canonical(mask)
    assert offline.labels.any() and np.array_equal(np.asarray(in_ras.dataobj), offline.labels)


def test_volumes_are_millilitres_of_the_file_s_own_voxels(client) -> None:
    found = client.post("/v1/predict?model=seg", content=nifti_bytes(nii())).json()
    assert found["voxels"]["organ"] > 0
    assert found["volumes_ml"]["organ"] == pytest.approx(found["voxels"]["organ"] * 6 / 1000)
    assert 0 <= found["uncertainty"] <= 1


def test_a_picture_s_mask_is_a_png_on_demand(client) -> None:
    answer = client.post("/v1/predict?model=seg2d", content=png(), headers={"Accept": "image/png"})
    assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")


def test_a_dicom_series_comes_as_zip_or_multipart_and_goes_as_dicom_seg(client, shared_data) -> None:
    from pydicom import dcmread

    files = sorted((shared_data / "dicom/dcmqi/data/segmentations/24x38x3/image").iterdir())
    accept = {"Accept": "application/dicom"}
    body = zipped({"DICOMDIR.txt": b"notes", **{f"Mustermann/{path.name}": path.read_bytes() for path in files}})
    answer = client.post("/v1/predict?model=seg", content=body, headers=accept)
    assert answer.status_code == 200, answer.text
    segmentation = dcmread(io.BytesIO(answer.content))
    sources = [dcmread(path, stop_before_pixels=True) for path in files]
    assert segmentation.Modality == "SEG" and segmentation.PatientID == sources[0].PatientID
    assert segmentation.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    places = {tuple(float(v) for v in source.ImagePositionPatient) for source in sources}
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        assert tuple(float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient) in places
    parts = [("file", (path.name, path.read_bytes(), "application/dicom")) for path in files]
    again = client.post("/v1/predict?model=seg", files=parts).json()
    assert again["task"] == "segmentation" and "wrong-modality" in {flag["flag"] for flag in again["flags"]}


def test_figures_go_as_a_dicom_structured_report(client, shared_data) -> None:
    import highdicom as hd

    files = sorted((shared_data / "dicom/dcmqi/data/segmentations/24x38x3/image").iterdir())
    body = zipped({path.name: path.read_bytes() for path in files})
    wanted = client.post("/v1/predict?model=seg", content=body).json()
    answer = client.post("/v1/predict?model=seg", content=body, headers={"Accept": "application/dicom; object=sr"})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/dicom"
    groups = {
        group.tracking_identifier: group.get_measurements()[0].value
        for group in hd.sr.srread(io.BytesIO(answer.content)).content.get_image_measurement_groups()
    }
    assert groups == pytest.approx(wanted["volumes_ml"] | {"answer": wanted["uncertainty"]})
    refused = client.post("/v1/predict", content=png(), headers={"Accept": "application/dicom"})
    assert refused.status_code == 406 and "DICOM-SR" in refused.json()["error"]["message"]


def test_arrays_and_channels(client) -> None:
    rng = np.random.default_rng(0)
    assert client.post("/v1/predict", content=npy(rng.random((20, 20)))).status_code == 200
    assert client.post("/v1/predict?model=seg", content=npy(rng.random((1, 18, 18, 18), np.float32))).status_code == 200
    assert client.post("/v1/predict", content=npy(rng.random((3, 20, 20)))).json()["error"]["reason"] == "unfit-image"
    assert client.post("/v1/predict", content=npy(np.array([{}], dtype=object))).status_code == 422


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"hello", {}, 415),
        (gzip.compress(bytes(4096), mtime=0), {}, 415),
        (png(), {"Content-Type": "application/dicom"}, 415),
        (png(), {"Accept": "application/nifti"}, 406),
        (png(), {"Accept": "text/html"}, 406),
        (png()[:40], {}, 422),
        (png(), {"Content-Encoding": "gzip"}, 415),
        (png(), {"Content-Type": "multipart/form-data"}, 400),
        (png(), {"Content-Type": "multipart/form-data; boundary=x"}, 400),
        (npy(np.zeros((4, 4))).replace(b"(4, 4)", b"((4, 4"), {}, 422),
        (b"PK\3\4 not really", {}, 400),
        (zipped({"../evil.dcm": b"x"}), {}, 400),
        (zipped({"/etc/evil.dcm": b"x"}), {}, 400),
        (zipped({"C:evil.dcm": b"x"}), {}, 400),
        (zipped({"readme.txt": b"x"}), {}, 422),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(client, body, headers, status) -> None:
    answer = client.post("/v1/predict", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"reason", "message"}
    assert "/tmp" not in answer.text


def test_bombs_and_large_bodies_are_refused_before_they_unfold(make_client) -> None:
    client = make_client(limits={"body_mb": 1, "unpacked_mb": 4})
    dicom = bytes(128) + b"DICM" + bytes(8 << 20)
    assert client.post("/v1/predict", content=zipped({"a.dcm": dicom})).status_code == 413
    assert client.post("/v1/predict", content=bytes(2 << 20)).status_code == 413
    assert client.post("/v1/predict", content=iter([bytes(1 << 20), bytes(1 << 20)])).status_code == 413
    stream = io.BytesIO()
    Pillow.new("L", (1200, 1200)).save(stream, format="PNG")  # a few kilobytes, and 5.8 MB decoded
    blank = stream.getvalue()
    assert client.post("/v1/predict", content=blank).status_code == 413
    many = zipped({f"{n}.txt": b"" for n in range(20)})
    assert make_client(limits={"files": 10}).post("/v1/predict", content=many).status_code == 413


def test_nothing_is_left_behind(client, tmp_path, monkeypatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    seen: list[Path] = []
    make = client.service.new_folder
    monkeypatch.setattr(client.service, "new_folder", lambda: seen.append(make()) or seen[-1])
    for body in (png(), b"nonsense", zipped({"../evil.dcm": b"x"})):
        client.post("/v1/predict", content=body)
    client.post("/v1/predict", files=[("file", ("../../evil", png(), "image/png"))])
    state = Path(client.service.fleet.config.state)
    assert len(seen) == 4 and all(state / "work" in folder.parents and not folder.exists() for folder in seen)
    assert not list((tmp_path / "temporary").iterdir())
    assert not list(tmp_path.rglob("*evil*"))


def test_an_idempotency_key_gets_the_same_answer_once(make_client) -> None:
    client, headers = make_client(), {"Idempotency-Key": "a1"}
    first = client.post("/v1/predict", content=png(), headers=headers)
    second = client.post("/v1/predict", content=png(), headers=headers)
    assert first.content == second.content and second.headers["idempotency-replayed"] == "true"
    assert len(audit(client)) == 1
    assert client.post("/v1/predict", content=png(seed=1), headers=headers).status_code == 422
    assert client.post("/v1/predict", content=png(), headers={"Idempotency-Key": "x" * 300}).status_code == 400


def test_what_grows_by_resampling_is_refused_before_it_grows(make_client, tmp_path) -> None:
    bundle = write_small(tmp_path / "fine", "segmentation", ndim=3, spacing=(1.0, 1.0, 1.0))
    models = {"fine": {"runtime": "torch", "versions": {"1": {"bundle": str(bundle)}}}}
    client = make_client(models=models, limits={"unpacked_mb": 1})
    coarse = nii((8, 8, 8), affine=np.diag([40.0, 40.0, 40.0, 1.0]))  # 2 kB, and 131 MB at 1 mm
    for route in ("predict", "explain"):
        answer = client.post(f"/v1/{route}", content=nifti_bytes(coarse))
        assert answer.status_code == 413 and "once resampled" in answer.json()["error"]["message"], answer.text
    fitting = client.post("/v1/predict", content=nifti_bytes(nii((8, 8, 8), affine=np.eye(4))))
    assert fitting.status_code == 200 and fitting.json()["uncertainty"] is not None
    assert client.post("/v1/predict", content=npy(np.zeros((8, 8, 8)))).json()["error"]["reason"] == "unfit-image"


def test_probabilities_are_spared_by_the_larger_grid(make_client, tmp_path, monkeypatch) -> None:
    from medray.engines.ray.serve import answers

    bundle = write_small(tmp_path / "fine", "segmentation", ndim=3, spacing=(1.0, 1.0, 1.0))
    client = make_client(models={"fine": {"runtime": "torch", "versions": {"1": {"bundle": str(bundle)}}}})
    monkeypatch.setattr(answers, "PROBABILITY_BYTES", 4 * 2 * 16**3 - 1)
    small = nifti_bytes(nii((8, 8, 8), affine=np.diag([2.0, 2.0, 2.0, 1.0])))
    assert client.post("/v1/predict", content=small).json()["uncertainty"] is None


def test_zips_of_any_method_and_any_claim_are_refused_without_a_defect(make_client) -> None:
    damaged = bytearray(zipped({"a.dcm": bytes(128) + b"DICM" + bytes(4000)}, zipfile.ZIP_LZMA))
    damaged[35 + 9 : 35 + 40] = b"\xff" * 31
    client = make_client(limits={"files": 10})
    answer = client.post("/v1/predict", content=bytes(damaged))
    assert answer.status_code == 400 and "LZMA" in answer.text
    many = zipped({f"{n:0200}.txt": b"" for n in range(600)})  # a directory of 148 kB
    answer = client.post("/v1/predict", content=many)
    assert answer.status_code == 413 and "directory" in answer.json()["error"]["message"]


def test_a_full_disk_is_told_as_such(make_client, monkeypatch) -> None:
    import errno

    client = make_client()

    def full() -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret")

    monkeypatch.setattr(client.service, "new_folder", full)
    answer = client.post("/v1/predict", content=png())
    assert answer.status_code == 503 and answer.json()["error"]["reason"] == "no-space"
    assert int(answer.headers["retry-after"]) > 0 and "secret" not in answer.text


def test_looking_costs_no_prediction_and_readiness_names_nothing(make_client, tmp_path) -> None:
    key = add_key(tmp_path / "keys.json", "pacs", ("predict",), requests_per_minute=1)
    client = make_client(security={"keys": str(tmp_path / "keys.json")})
    headers = {"X-API-Key": key}
    for _ in range(3):
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v2/models/cls", headers=headers).status_code == 200
    assert client.post("/v1/predict", content=png(), headers=headers).status_code == 200
    assert client.post("/v1/predict", content=png(), headers=headers).status_code == 429
    for path in ("/v2/models/x/ready", "/v2/models/cls/versions/7/ready"):
        answer = client.get(path)
        assert answer.status_code == 404 and "cls" not in answer.text
    assert client.get("/v1/models").status_code == 401


def test_tensors_that_are_too_large_are_refused(make_client) -> None:
    client = make_client(limits={"unpacked_mb": 1})
    tensor = {"name": "image", "datatype": "FP32", "shape": [2000, 1, 16, 16], "data": [0]}
    answer = client.post("/v2/models/cls/infer", json={"inputs": [tensor]})
    assert answer.status_code == 413 and "unpacked_mb" in answer.json()["error"]


def test_too_many_at_once_are_told_to_come_again_while_health_stays_green(make_client, monkeypatch) -> None:
    client = make_client(limits={"waiting": 1})
    free, version = threading.Event(), client.service.fleet.table["cls"]["1"]
    engine, started = version.batcher.engine, threading.Event()

    class Slow:
        name, precision = engine.name, engine.precision

        def __call__(self, array: Any) -> Any:
            started.set()
            free.wait(20)
            return engine(array)

    monkeypatch.setattr(version.batcher, "engine", Slow())
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/predict", content=png())))
    thread.start()
    assert started.wait(20)
    refused = client.post("/v1/predict", content=png(seed=1))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert client.get("/v2/health/ready").status_code == 200
    free.set()
    thread.join(20)
    assert answers[0].status_code == 200
    assert client.post("/v1/predict", content=png()).status_code == 200


def test_models_metrics_and_status(client) -> None:
    client.post("/v1/predict", content=png())
    before = client.get("/metrics").text
    listed = client.get("/v1/models").json()
    assert listed["default"] == "cls" and {one["name"] for one in listed["models"]} == {"cls", "seg", "seg2d"}
    client.get("/somewhere/patient-name")
    client.post("/v1/predict", content=png())
    text = client.get("/metrics").text
    for name in (
        'medray_requests_total{route="/v1/predict",status="200"}',
        'medray_stage_seconds_count{model="cls",stage="network",version="1"}',
    ):
        values = [float(line.split()[-1]) for page in (before, text) for line in page.splitlines() if name in line]
        assert values[1] == values[0] + 1
    assert "patient-name" not in text
    assert client.get("/v1/status").json()["config_error"] is None
    assert client.get("/nowhere").json()["error"]["reason"] == "no-such-route"


def test_nothing_of_a_patient_is_logged(client, save_dicom, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        for accept in ("application/json", "application/dicom"):
            client.post("/v1/predict?model=seg2d", content=save_dicom, headers={"Accept": accept})
        client.post("/v1/predict", content=save_dicom[:600])
    everything = caplog.text + json.dumps(audit(client)) + client.get("/metrics").text
    assert "Erika" not in everything and "MRN4711" not in everything


@pytest.fixture
def save_dicom() -> bytes:
    """One CT slice of a patient with a name."""
    import io

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = generate_uid(), generate_uid(), "CT"
    data.PatientName, data.PatientID = "Mustermann^Erika", "MRN4711"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 24, 20, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = np.random.default_rng(0).integers(0, 2000, (24, 20), dtype=np.uint16).tobytes()
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_an_explanation_is_a_picture_or_a_map_on_the_scan_s_own_grid(client, tmp_path) -> None:
    answer = client.post("/v1/explain?target=ill", content=png())
    assert answer.status_code == 200, answer.text
    assert answer.content.startswith(b"\x89PNG") and answer.headers["medray-target"] == "ill"
    scan = nii()
    answer = client.post("/v1/explain?model=seg", content=nifti_bytes(scan), headers={"Accept": "application/nifti"})
    (tmp_path / "map.nii.gz").write_bytes(answer.content)
    heat = nib.load(tmp_path / "map.nii.gz")
    assert heat.shape == scan.shape and np.allclose(heat.affine, scan.affine)
    assert float(heat.get_fdata().min()) >= 0 and float(heat.get_fdata().max()) == pytest.approx(1, abs=1e-5)
    assert client.post("/v1/explain?target=nothing", content=png()).status_code == 422
    assert client.post("/v1/explain?method=magic", content=png()).json()["error"]["reason"] == "invalid"


def test_a_defect_is_told_by_its_place_alone(make_client, monkeypatch, caplog, capsys) -> None:
    client = make_client()

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("Mustermann")

    monkeypatch.setattr(client.service, "_answer", broken)
    with logs.configured("json"), caplog.at_level(logging.DEBUG):
        answer = client.post("/v1/predict", content=png())
    said = capsys.readouterr().err
    assert answer.status_code == 500 and answer.json()["error"]["reason"] == "defect"
    assert '"where"' in said and "KeyError" in said
    assert "Mustermann" not in answer.text + said + caplog.text
    assert client.service.predictions.inside == 0
