"""medray serve, medray keys and medray predict --server: what they hand over and print."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from medray.cli.main import main
from medray.engines.ray.serve import keys
from medray.errors import ServingError
from medray.workflows import client, serving


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medray", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_serve_hands_over_what_was_said_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[Any] = []

    def serve(what: list[str], **options: Any) -> None:
        options.pop("started")("http://127.0.0.1:9000", Path("serve.yaml"))
        seen.append((what, options))

    monkeypatch.setattr(serving, "serve", serve)
    assert run(monkeypatch, "serve", "a", "b", "--port", "9000", "--keys", "k.json", "--runtime", "onnx") == 0
    changes = {"port": 9000, "security": {"keys": "k.json"}}
    assert seen == [(["a", "b"], {"changes": changes, "runtime": "onnx", "address": None})]
    assert "serving at http://127.0.0.1:9000" in capsys.readouterr().out


def test_bundles_become_a_configuration_that_can_be_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/seg/bundle", "runs/cls/bundle", "old/seg"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "bundle.json").write_text("{}")
    bundles = ["runs/seg/bundle", "runs/cls/bundle", "old/seg"]
    wanted = serving.configuration(bundles, {"port": 9000, "security": {"keys": "k.json"}}, "onnx")
    path = wanted.path
    assert not path.parent.exists()  # a server that runs there follows the file: nothing is written before the lock
    with serving.alone(path.parent):
        wanted.write()
    assert path == tmp_path / "runs/serve/serve.yaml"
    assert path.parent.stat().st_mode & 0o077 == 0
    content = yaml.safe_load(path.read_text())
    assert list(content["models"]) == ["seg", "cls", "seg-2"] and content["port"] == 9000
    assert content["security"]["keys"] == str(tmp_path / "k.json")
    assert content["models"]["seg"] == {
        "versions": {"1": {"bundle": str(tmp_path / "runs/seg/bundle")}},
        "runtime": "onnx",
    }
    own = serving.configuration([str(path)], {})
    assert own.path == path and own.config == wanted.config and own.text is None
    with pytest.raises(ServingError, match="write port into it"):
        serving.configuration([str(path)], {"port": 1})
    with pytest.raises(ServingError, match="neither a bundle"):
        serving.configuration(["runs"], {})


def test_a_second_server_in_a_folder_changes_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seg").mkdir()
    (tmp_path / "seg/bundle.json").write_text("{}")
    state = tmp_path / "runs/serve"
    with serving.alone(state):
        (state / "metrics").mkdir()
        (state / "serve.yaml").write_text("of the first")
        with pytest.raises(ServingError, match="another server uses this folder; set state to another one"):
            serving.serve(["seg"], changes={})
        assert (state / "serve.yaml").read_text() == "of the first" and (state / "metrics").is_dir()
    with serving.alone(state):  # it is let go
        pass


def test_keys_are_added_listed_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(keys, "_COST", 2)
    file = str(tmp_path / "keys.json")
    assert run(monkeypatch, "keys", "add", "pacs", "-f", file, "--scope", "predict", "--scope", "explain") == 0
    key = capsys.readouterr().out.strip()
    assert keys.KeyRing(Path(file)).who(key, "explain").name == "pacs"
    assert run(monkeypatch, "keys", "list", "-f", file) == 0
    listed = capsys.readouterr().out
    assert "pacs" in listed and "predict explain" in listed and key.split("_", 2)[2] not in listed
    assert run(monkeypatch, "keys", "revoke", "pacs", "-f", file) == 0
    assert run(monkeypatch, "keys", "add", "x", "-f", file, "--scope", "all") == 2
    assert "no scope all" in capsys.readouterr().err


def test_predict_asks_a_server_with_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[Any] = []
    summary = SimpleNamespace(
        selection=SimpleNamespace(shown="onnx fp32"),
        answers=(),
        failed=(),
        directory=Path("out"),
        intended_use="Research use only.",
        exit_code=0,
    )

    def ask(*words: Any, **options: Any) -> Any:
        options.pop("progress")
        seen.append((words, options))
        return summary

    monkeypatch.setattr(client, "predict_by_server", ask)
    monkeypatch.setenv("MEDRAY_API_KEY", "secret")
    assert run(monkeypatch, "predict", "a.png", "b.png", "--server", "http://x", "--model", "m", "-o", "out") == 0
    assert seen == [(("http://x", ["a.png", "b.png"], Path("out")), {"key": "secret", "model": "m"})]
    assert run(monkeypatch, "predict", "bundle") == 2
