"""HAProxy is told to listen where it should."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest

from medray.config.serving import check_serving
from medray.engines.ray.serve import haproxy

MODELS = {"seg": {"versions": {"1": {"bundle": "b"}}}}


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "*"), ("::1", "::1")])
def test_what_ray_writes_is_mended_before_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, shown: str
) -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    wide = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "bind :" in line or "bind *:" in line]
    assert len(wide) == 2 and "mode 666" in HAPROXY_CONFIG_TEMPLATE  # what there is to mend, in the Ray that is here
    program = tmp_path / "real haproxy"
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    program.chmod(0o700)
    monkeypatch.setattr(haproxy, "available", lambda: str(program))
    content = {"models": MODELS, "host": host, "security": {"keys": "keys.json"}}
    variables = haproxy.variables(check_serving(content, source="test", folder=tmp_path), tmp_path)
    script = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    written = tmp_path / "haproxy.cfg"
    ports = {name.split("HAPROXY_")[-1].lower(): port for name, port in variables.items() if name.endswith("_PORT")}
    options = {**ports, "frontend_host": shown, "frontend_port": "8000"}
    written.write_text(
        re.sub(r"{{ config\.(\w+) }}", lambda match: options.get(match[1], match[0]), HAPROXY_CONFIG_TEMPLATE)
    )
    done = subprocess.run([script, "-db", "-f", written, "-sf", "12"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-db|-f|{written}|-sf|12|"
    text = written.read_text()
    binds = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    # The frontend's follows the host.
    assert binds[:2] == [f"127.0.0.1:{ports['metrics_port']}", f"{shown}:8000"]
    assert binds[-1] == f"127.0.0.1:{ports['stats_port']}"
    assert "mode 666" not in text and "errorfile 503" not in text
    assert len({value for name, value in variables.items() if name.endswith("_PORT")}) == 3


def test_without_the_program_it_is_left_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "available", lambda: None)
    config = check_serving({"models": MODELS}, source="test", folder=tmp_path)
    assert haproxy.variables(config, tmp_path) == {}
