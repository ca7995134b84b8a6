"""The choice of the engine: measured, agreeing with the golden outputs, remembered for this machine."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from medray.bundle import engines
from medray.bundle.read import Bundle
from medray.errors import BundleError, ModelError


class Engine:
    """An engine with the right logits, after some seconds, off by something."""

    def __init__(self, name, precision, bundle, seconds=0.0, off=0.0):
        self.name, self.precision, self.seconds = name, precision, seconds
        inputs, logits = bundle.golden()
        self.known = {row.tobytes(): out + np.float32(off) for row, out in zip(inputs, logits, strict=True)}

    def __call__(self, batch):
        time.sleep(self.seconds)
        return np.stack([self.known[np.ascontiguousarray(row).tobytes()] for row in batch])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def staged(pristine, monkeypatch, cache):
    """staged(torch=dict(seconds=…, off=…), …): a bundle whose engines are those; ``staged.made``: which were made."""
    made: list[tuple[str, str]] = []

    def stage(**plans):
        bundle = Bundle.open(pristine)

        def make(_bundle, runtime, *, device, precision, threads):
            made.append((runtime, precision))
            plan = plans[runtime]
            if isinstance(plan, Exception):
                raise plan
            engine = Engine(runtime, precision, bundle, **plan)
            engines.check_golden(engine, *bundle.golden(), bundle.spec.kind)
            return engine

        monkeypatch.setattr(engines, "make_predictor", make)
        monkeypatch.setattr("medray.bundle.read.make_predictor", make)
        monkeypatch.setattr(engines, "candidates", lambda *_: [(name, "fp32") for name in plans])
        return bundle

    stage.made = made
    return stage


def test_the_fastest_that_agrees_is_taken(staged):
    bundle = staged(torch={"seconds": 0.02}, onnx={"seconds": 0.004}, openvino={"seconds": 0.0, "off": 1.0})
    found = bundle.select()
    assert (found.engine, found.precision) == ("onnx", "fp32")
    assert "not openvino fp32" in found.fallback_reason and "golden outputs" in found.fallback_reason
    assert [attempt.engine for attempt in found.attempts] == ["onnx", "torch", "openvino"]
    assert found.attempts[2].seconds is None
    assert bundle.predictor("auto").name == "onnx"
    assert "onnx fp32" in found.shown and "not openvino" in found.shown


def test_nothing_fell_out_means_no_reason(staged):
    assert staged(torch={"seconds": 0.01}, onnx={}).select().fallback_reason is None


def test_the_choice_is_remembered_outside_of_the_bundle(staged, cache, pristine):
    before = set(pristine.rglob("*"))
    plans = {"torch": {"seconds": 0.01}, "onnx": {}}
    first = staged(**plans).select()
    count = len(staged.made)
    assert staged(**plans).select() == first
    assert len(staged.made) == count, "read, not measured again"
    assert set(pristine.rglob("*")) == before
    assert [path.suffix for path in (cache / "engines").iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"engine": "x", "attempts": []}', '{"engine": 1, "attempts": [3]}'])
def test_a_spoilt_memory_is_measured_again(staged, cache, text):
    plans = {"torch": {"seconds": 0.01}, "onnx": {}}
    staged(**plans).select()
    (path,) = (cache / "engines").iterdir()
    path.write_text(text)
    assert staged(**plans).select().engine == "onnx"


def test_another_machine_or_number_of_threads_measures_for_itself(staged, cache, monkeypatch):
    plans = {"torch": {}, "onnx": {"seconds": 0.01}}
    bundle = staged(**plans)
    bundle.select(threads=1)
    bundle.select(threads=2)
    monkeypatch.setattr(engines, "cpu_model", lambda: "another")
    staged(**plans).select(threads=1)
    assert len(list((cache / "engines").iterdir())) == 3


def test_a_remembered_engine_that_no_longer_agrees_is_replaced(staged, cache):
    staged(torch={"seconds": 0.01}, onnx={}).select()
    broken = staged(torch={"seconds": 0.01}, onnx={"off": 1.0})
    assert broken.predictor("auto").name == "torch"
    (path,) = (cache / "engines").iterdir()
    assert json.loads(path.read_text())["engine"] == "torch"


def test_an_engine_that_fails_says_why_and_none_at_all_is_an_error(staged):
    found = staged(torch={}, onnx=ModelError("no driver")).select()
    assert found.engine == "torch" and "no driver" in found.fallback_reason
    with pytest.raises(BundleError, match=r"no runtime can answer on cpu: torch fp32: .*golden"):
        staged(torch={"off": 1.0}).select(threads=3)


def test_a_named_engine_is_made_and_not_measured(pristine, cache):
    found = Bundle.open(pristine).select("torch", precision="bf16")
    assert (found.engine, found.precision, found.attempts) == ("torch", "bf16", ())
    assert not cache.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_tiny, tiny_catalogue):
    """A bundle with its ONNX file: read only."""
    return write_tiny(tmp_path_factory.mktemp("whole") / "b", onnx=True)


def test_real_engines_are_measured(whole, cache):
    bundle = Bundle.open(whole.directory)
    assert bundle.runtimes == ("torch", "onnx", "openvino")
    found = bundle.select(threads=1)
    assert {a.engine for a in found.attempts} == {"torch", "onnx", "openvino"}
    assert all(a.reason is None for a in found.attempts if a.precision == "fp32")
    assert bundle.predictor("auto", threads=1).name == found.engine


def test_what_cannot_be_had_is_said(pristine, whole):
    bundle = Bundle.open(pristine)
    with pytest.raises(BundleError, match="no ONNX file"):
        bundle.predictor("openvino")
    with pytest.raises(BundleError, match="there is no runtime 'tpu'"):
        bundle.predictor("tpu")
    with pytest.raises(BundleError, match="int8 is a bundle of its own"):
        bundle.predictor("torch", precision="int8")
    with pytest.raises(BundleError, match="runs on cpu, not cuda"):
        whole.predictor("openvino", device="cuda")
    with pytest.raises(BundleError, match="computes in fp32, not bf16"):
        whole.predictor("onnx", precision="bf16")
