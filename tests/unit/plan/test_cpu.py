"""What the system says of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from medray.plan import cpu


def test_the_first_processor_speaks_for_all(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_bytes(b"processor\t: 0\nmodel name\t: A: fast \xff\nflags\t\t: fpu amx_bf16\n\nmodel name\t: B\n")
    assert cpu.cpu_info("model name", path) == "A: fast \ufffd"
    assert cpu.cpu_info("flags", path).split() == ["fpu", "amx_bf16"]
    assert cpu.cpu_info("model", path) == ""
    assert cpu.cpu_info("flags", tmp_path / "nothing") == ""


def test_where_the_system_does_not_say_the_architecture_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_info", lambda _: "")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert cpu.cpu_model() == platform.machine()
