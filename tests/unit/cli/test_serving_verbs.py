"""medray serve, medray keys and medray predict --server: what they hand over and print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from medray.cli.main import main
from medray.engines.ray.serve import keys
from medray.errors import ConfigError, ServingError, StorageError
from medray.workflows import client, diary, serving


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
    (what, options) = seen[0]
    assert what == ["a", "b"] and callable(options.pop("note"))
    assert options == {"changes": changes, "runtime": "onnx", "address": None, "registry": Path("runs")}
    assert run(monkeypatch, "serve", "models:/a@champion", "--registry", "r", "--grpc-port", "9001") == 0
    assert seen[1][1]["registry"] == Path("r") and seen[1][1]["changes"] == {"grpc_port": 9001}
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


def test_a_name_of_the_registry_becomes_the_version_that_it_stands_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diary, "PATIENCE", 500.0)  # a busy machine opens MLflow's store slowly
    study = tmp_path / "runs/seg"
    (study / "bundle").mkdir(parents=True)
    notes: list[str] = []
    for number in ("one", "two"):
        (study / "bundle/bundle.json").write_text(json.dumps({"number": number}))
        diary.Diary(tmp_path / "runs", "seg", notes.append).end({})
    assert notes == [f"registered as models:/seg@champion, version {number}" for number in (1, 2)]

    def served(text: str) -> tuple[str, str]:
        wanted = serving.configuration([text], {}, note=notes.append)
        ((version, one),) = wanted.config.models["seg"].versions.items()
        return version, json.loads((Path(one.bundle) / "bundle.json").read_text())["number"]

    assert served("models:/seg@champion") == ("2", "two") and "is version 2, " in notes[-1]
    assert served("models:/seg/1") == ("1", "one"), "a copy: what the study writes later is another version"
    (study / "bundle/bundle.json").write_text("{}")
    assert served("models:/seg@champion") == ("2", "two")
    for text, message in (
        ("models:/seg/3", "no such version"),
        ("models:/seg@other", "no such version"),
        ("models:/none@champion", "Models there: seg"),
    ):
        with pytest.raises(StorageError, match=message):
            served(text)
    for text in ("models:/seg", "models:/seg@", "models:/../seg@champion", "models:/seg/latest"):
        with pytest.raises(ServingError, match="models:/NAME@champion"):
            served(text)
    with pytest.raises(StorageError, match=r"holds no mlflow\.db"):
        serving.configuration(["models:/seg@champion"], {}, registry=tmp_path)
    for path in tmp_path.glob("runs/mlartifacts/seg/*/artifacts/bundle/bundle.json"):
        path.write_text("{ }")
    with pytest.raises(ServingError, match="is not the bundle that was registered as version 2"):
        served("models:/seg@champion")


def test_two_versions_of_one_registered_model_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """As "seg" and "seg-2" nobody could tell that the latter is version 3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle.json").write_text("{}")
    monkeypatch.setattr(serving, "_registered", lambda text, *_: (*text.split("/")[1:], tmp_path))
    both = ["models:/seg/2", "models:/seg/3"]
    with pytest.raises(ServingError, match=r"models:/seg/3: seg is named twice.*models\.seg\.versions"):
        serving.configuration(both, {})
    wanted = serving.configuration(["models:/seg/2", "models:/cls/3"], {})
    assert {name: list(one.versions) for name, one in wanted.config.models.items()} == {"seg": ["2"], "cls": ["3"]}


def test_a_file_names_folders_not_aliases(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("models: {seg: {versions: {'1': {bundle: 'models:/seg@champion'}}}}")
    with pytest.raises(ConfigError, match="an alias may move"):
        serving.configuration([str(path)], {})


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
