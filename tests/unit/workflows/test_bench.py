from __future__ import annotations

import json

import pytest
import torch

from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.errors import ConfigError
from medray.models.catalogue import build_model
from medray.workflows.bench import SPLIT, bench


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory):
    """An untrained 2-D classifier, with ONNX."""
    torch.manual_seed(0)
    config = ModelConfig(name="small_cnn", feature_size=8)
    model = build_model(config, kind="classification", ndim=2, in_channels=1, num_outputs=2, patch_size=(28, 28))
    directory = tmp_path_factory.mktemp("bench") / "bundle"
    write_bundle(
        directory,
        kind="classification",
        ndim=2,
        channels=1,
        classes=["a", "b"],
        preprocess=PreprocessConfig(size=(28, 28)),
        inference=InferenceSpec(),
        models=[model],
        configs=[config],
    )
    return directory


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRAY_CACHE", str(tmp_path / "cache"))


def test_every_engine_has_its_figures(bundle_dir):
    found = bench(bundle_dir, threads=1, batches=(1, 3), seconds=0.01, isolated=False)
    assert {row.engine for row in found.engines} == {"torch", "onnx", "openvino"}
    exact = [row for row in found.engines if row.precision == "fp32"]
    for row in exact:
        assert row.reason is None and row.calls >= 3
        assert 0 < row.latency_ms["p50"] <= row.latency_ms["p95"] <= row.latency_ms["p99"]
        assert set(row.throughput) == {1, 3} and min(row.throughput.values()) > 0
        assert tuple(row.split_ms) == SPLIT and min(row.split_ms.values()) > 0
    assert found.chosen.engine in {row.engine for row in found.engines}
    sizes = found.size_mb
    assert sizes["bundle"] > sizes["weights"] + sizes["onnx"] > 0
    assert sizes["onnx"] == pytest.approx((bundle_dir / "model.onnx").stat().st_size / 1e6)
    tree = json.loads(found.to_json())
    assert tree["shape"] == [1, 28, 28] and len(tree["engines"]) == len(found.engines)


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"seconds": 0.0}])
def test_nonsense_is_refused(bundle_dir, wrong):
    with pytest.raises(ConfigError, match="batches"):
        bench(bundle_dir, **wrong)
