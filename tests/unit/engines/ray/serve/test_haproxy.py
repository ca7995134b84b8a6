"""HAProxy is told to listen where it should."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from medray.config.serving import check_serving
from medray.engines.ray.serve import haproxy

MODELS = {"seg": {"versions": {"1": {"bundle": "b"}}}}


def test_what_ray_writes_is_mended_before_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    wide = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "bind :" in line or "bind *:" in line]
    assert len(wide) == 2 and "mode 666" in HAPROXY_CONFIG_TEMPLATE  # what there is to mend, in the Ray that is here
    program = tmp_path / "real haproxy"
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o700)
    monkeypatch.setattr(haproxy, "available", lambda: str(program))
    config = check_serving({"models": MODELS}, source="test", folder=tmp_path)
    variables = haproxy.variables(config, tmp_path)
    script = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    written = tmp_path / "haproxy.cfg"
    written.write_text(HAPROXY_CONFIG_TEMPLATE)
    done = subprocess.run([script, "-db", "-f", written, "-sf", "12"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-db|-f|{written}|-sf|12|"
    text = written.read_text()
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in text and "bind 127.0.0.1:{{ config.stats_port }}" in text
    assert "bind {{ config.frontend_host }}:" in text  # this one follows the host
    assert "mode 666" not in text and "errorfile 503" not in text
    assert len({value for name, value in variables.items() if name.endswith("_PORT")}) == 3


def test_without_the_program_it_is_left_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: None)
    config = check_serving({"models": MODELS}, source="test", folder=tmp_path)
    assert haproxy.variables(config, tmp_path) == {}
