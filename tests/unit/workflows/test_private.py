"""medray train under privacy: what it reserves, says and gives back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medray.cli import train as verb
from medray.errors import PrivacyError
from medray.privacy.ledger import Ledger, Limits
from medray.workflows.training import train_experiment

DATA = "data=phantom://ct-nodule-type?cases=48&size=16"
TINY = [
    "model.name=small_cnn",
    "model.feature_size=4",
    "model.depth=2",
    "train.epochs=2",
    "train.batch_size=12",
    "train.precision=fp32",
    "split.test=0",
    "device=cpu",
    "privacy.epsilon=8",
    "privacy.delta=1e-3",
    "privacy.metric_noise=2",
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where prepared cases go


@pytest.mark.usefixtures("cache")
def test_a_private_run_reserves_says_and_settles(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger", Limits(epsilon=10.0, delta=1e-3))
    asked = [DATA, *TINY, f"privacy.ledger={ledger.path}"]
    trained = train_experiment(None, asked, out=tmp_path / "run")
    (entry,) = ledger.entries()
    assert entry.reservation.run == "run" and entry.settled == entry.reservation.history
    told = json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]
    assert 7.5 < told["epsilon"] <= 8 and told["delta"] == 1e-3 and told["unit"] == "patient"
    assert told["steps"] == entry.settled[1][2] == trained.fit.steps and told["ledger"] is True
    assert told["epsilon"] == pytest.approx(ledger.spent().epsilon, rel=1e-6)
    assert any("add" in line and "patient" in line for line in trained.privacy)
    assert trained.fit.best.keys() <= {"val/accuracy"} and trained.experiment.model.norm == "group"
    again = train_experiment(None, asked, out=tmp_path / "run", resume=True)
    assert again.privacy == trained.privacy and len(ledger.entries()) == 1
    with pytest.raises(PrivacyError, match="would bring epsilon to"):
        train_experiment(None, asked, out=tmp_path / "other")
    assert not (tmp_path / "other" / "weights.safetensors").exists() and len(ledger.entries()) == 1


@pytest.mark.usefixtures("cache")
def test_what_a_crash_left_reserved_counts_and_is_used_up_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def dies(*_args: object, **_named: object) -> float:
        raise Killed

    ledger = Ledger.create(tmp_path / "ledger", Limits(epsilon=10.0, delta=1e-3))
    asked = [DATA, *TINY, f"privacy.ledger={ledger.path}"]
    with monkeypatch.context() as patch:
        patch.setattr("medray.workflows.private.private_mean", dies)
        with pytest.raises(Killed):
            train_experiment(None, asked, out=tmp_path / "run")
    (entry,) = ledger.entries()
    assert entry.settled is None and ledger.spent().epsilon > 7.5
    train_experiment(None, asked, out=tmp_path / "run", resume=True)
    (entry,) = ledger.entries()
    assert entry.settled is not None


def test_the_verb_prints_the_statement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    found = SimpleNamespace(headline="h", directory=Path("d"), privacy=("epsilon 3",))
    monkeypatch.setattr("medray.workflows.training.train_experiment", lambda *_a, **_k: found)
    verb.train(["data=x"])
    assert "epsilon 3" in capsys.readouterr().out
