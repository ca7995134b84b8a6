"""bench, compress and explain: what they hand over, and what they print."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from medray.cli.main import main
from medray.learn.intervals import Interval


@pytest.fixture
def fake(monkeypatch):
    """fake(module, **attributes): the workflow is not imported; calls of ``answer`` functions are kept in ``seen``."""
    seen = []

    def make(module, name, answer, **attributes):
        def called(*arguments, **keywords):
            seen.append((arguments, keywords))
            return answer

        stand_in = ModuleType(module)
        stand_in.__dict__.update({name: called, **attributes})
        monkeypatch.setitem(sys.modules, module, stand_in)

    make.seen = seen
    return make


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["medray", *arguments])
    with pytest.raises(SystemExit) as leave:
        main()
        raise SystemExit(0)
    return leave.value.code or 0


ROW = SimpleNamespace(
    engine="onnx",
    precision="fp32",
    reason=None,
    latency_ms={"p50": 4.0, "p95": 5.0, "p99": 6.0},
    throughput={1: 250.0, 4: 400.0},
    split_ms={"decode": 1.0, "prepare": 2.0, "network": 4.0, "finish": 0.5},
    peak_mb=321.0,
    load_seconds=0.7,
)
FALLEN = SimpleNamespace(
    engine="openvino", precision="bf16", reason="does not agree", latency_ms=None, throughput=None, split_ms=None
)


def test_bench_prints_a_table_or_json(monkeypatch, fake, capsys):
    found = SimpleNamespace(
        bundle="seg", kind="segmentation", shape=(1, 32, 32), threads=2, image="noise", engines=(ROW, FALLEN),
        size_mb={"bundle": 9.0, "weights": 4.0, "onnx": 4.1}, chosen=SimpleNamespace(shown="onnx fp32"),
        to_json=lambda: '{"bundle": "seg"}',
    )  # fmt: skip
    fake("medray.workflows.bench", "bench", found, SPLIT=("decode", "prepare", "network", "finish"))
    assert run(monkeypatch, "bench", "b", "--batches", "1,4", "--threads", "2") == 0
    (arguments, keywords), out = fake.seen[0], capsys.readouterr().out
    assert arguments == (Path("b"),) and keywords["batches"] == [1, 4] and keywords["threads"] == 2
    row = next(line for line in out.splitlines() if line.startswith("onnx fp32"))
    assert row.split()[2:] == ["4", "5", "6", "250", "400", "321", "0.7", "1", "2", "4", "0.5"]
    assert "openvino bf16: does not agree" in out and "auto takes: onnx fp32" in out
    assert run(monkeypatch, "bench", "b", "--json") == 0
    assert capsys.readouterr().out == '{"bundle": "seg"}\n'
    assert run(monkeypatch, "bench", "b", "--batches", "one") == 2
    assert "whole numbers" in capsys.readouterr().err


def test_compress_says_what_was_kept_and_what_undone(monkeypatch, fake, capsys):
    verdict = SimpleNamespace(
        drops={"dice": Interval(0.001, -0.002, 0.004)}, speedup=2.5, engines=("onnx fp32", "openvino int8"),
        onnx_mb=(4.0, 1.0), packed_mb=(3.5, 0.8),
    )  # fmt: skip
    steps = (
        SimpleNamespace(name="prune 0.5", kept=False, reason="nothing shrank", verdict=None, compared=""),
        SimpleNamespace(name="quantize int8", kept=True, reason="", verdict=verdict, compared="against x: dice +0.1"),
    )
    report = SimpleNamespace(steps=steps, validation_cases=42, bundle=Path("b-small"), exit_code=0)
    fake("medray.workflows.compress", "compress", report, CompressOptions=lambda **given: given)
    assert run(monkeypatch, "compress", "b", "data=x", "--prune", "0.5", "--quantize", "int8", "--qat") == 0
    (arguments, keywords), out = fake.seen[0], capsys.readouterr().out
    assert arguments[1]["qat"] is True and arguments[1]["sparsity"] is None
    assert "3.50 -> 0.80" in out and "quantize int8: against x: dice +0.1" in out
    assert arguments[0] == Path("b") and arguments[2] == ["data=x"] and keywords["out"] == Path("b-small")
    assert arguments[1]["prune"] == 0.5 and arguments[1]["max_drop"] == 0.005
    assert "prune 0.5: undone: nothing shrank" in out and "2.50" in out and "4.00 -> 1.00" in out
    report.bundle, report.exit_code = None, 1
    assert run(monkeypatch, "compress", "b", "--prune", "0.5") == 1
    assert "no bundle was written" in capsys.readouterr().out


def test_explain_names_the_files_and_what_failed(monkeypatch, fake, capsys):
    found = (
        SimpleNamespace(
            image="a.png", outputs=(Path("o/a.png"),), error=None, explanation=SimpleNamespace(target_name="sick")
        ),
        SimpleNamespace(image="b.png", outputs=(), error="truncated", explanation=None),
    )
    fake("medray.workflows.explanation", "explain_files", found)
    assert run(monkeypatch, "explain", "b", "a.png", "b.png", "-o", "o", "--method", "gradcam++") == 1
    arguments, keywords = fake.seen[0]
    assert arguments == (Path("b"), ["a.png", "b.png"], Path("o")) and keywords["method"] == "gradcam++"
    out = capsys.readouterr().out
    assert "a.png: sick -> o/a.png" in out and "b.png: failed: truncated" in out
