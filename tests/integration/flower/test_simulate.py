"""A federation from data to bundle, over Flower's messages: in this process, and once on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray.config.compose import Composed
from medray.config.schema import Experiment, StudyConfig
from medray.data.fingerprint import Fingerprint
from medray.data.manifest import Manifest
from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Parcel
from medray.errors import ConfigError, FederationError, PrivacyError
from medray.privacy.policy import recipe_digest
from medray.workflows.federation.keeping import kept_state, run_folder
from medray.workflows.federation.rounds import Federated, Rounds
from medray.workflows.federation.said import FIGURES
from medray.workflows.federation.shared import arrays_of, shared_names, statistics_of
from medray.workflows.federation.simulate import prepare_sites, simulate_federation
from medray.workflows.federation.site import SiteFolder, opener
from medray.workflows.prediction import predict_files
from medray.workflows.recipe import Recipe
from medray.workflows.training import new_model

ROWS = 160
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals; the illness follows two columns, the third hospital measures one of them otherwise."""
    rng = np.random.default_rng(0)
    lines = ["site,patient,age,marker,sex,label"]
    for row in range(ROWS):
        site, age, marker = row % 3, rng.normal(60, 10), rng.normal()
        ill = int((age - 60) / 10 + 2 * marker + rng.normal(0, 0.3) > 0)
        lines.append(f"{'abc'[site]},p{row // 2}-{site},{age:.2f},{marker + (site == 2):.3f},{'FM'[row % 2]},{ill}")
    path = tmp_path_factory.mktemp("table") / "cases.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def overrides(table: Path, **more: str) -> list[str]:
    found = [f"data={table}?columns=age,marker,sex", "model.name=linear", "optim.lr=0.1", "train.batch_size=16"]
    return [*found, "device=cpu", "federation.rounds=6", *(f"{k.replace('__', '.')}={v}" for k, v in more.items())]


def rounds(out: Path, recipe: Recipe, folders: tuple[SiteFolder, ...], spec: Experiment, **how: Any) -> Federated:
    model = new_model(spec, recipe.manifest)
    shared = shared_names(model, spec.federation)
    hub = in_process(opener(folders), len(folders))
    made = Rounds(
        hub, out, spec, arrays_of(model, shared), statistics_of(model), objective=("val/auc", "max"), latest=True, **how
    )
    return made.run(tuple(folder.name for folder in folders))


def prepared(table: Path, out: Path, **sections: Any) -> tuple[Recipe, tuple[SiteFolder, ...], Experiment]:
    explicit = {"data": f"{table}?columns=age,marker,sex", "device": "cpu", **sections}
    composed = Composed(explicit=explicit, study=StudyConfig(), space={}, source_file=None)
    recipe, folders = prepare_sites(composed, out, lambda *_: None)
    return recipe, folders, recipe.experiment()


def test_from_a_table_to_a_bundle_that_predicts(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = simulate_federation(None, overrides(table), out=tmp_path / "run")
    assert result.metrics["auc"].value > 0.9 and set(result.comparison) == {"each site alone", "pooled"}
    page = result.report.read_text(encoding="utf-8")
    assert "no differential privacy" in page and "Model of a row" in page and "a alone" in page
    assert "What the model gives away" in page and "by epsilon at most" in page
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["bytes"]["up"] > 0 and outcome["metrics"]["auc"][0] == pytest.approx(result.metrics["auc"].value)
    answers = predict_files(result.bundles[0], [table], tmp_path / "answers", "onnx")
    assert not answers.failed and len(answers.answers) == ROWS
    # No site's folder names another site's patients.
    for folder in sorted((tmp_path / "run" / "sites").iterdir()):
        own = Manifest.load(folder / "manifest.json")
        assert len({case.site for case in own.cases}) == 1
        sides: dict[str, set[str | None]] = {}
        for case in own.cases:
            sides.setdefault(case.group, set()).add(case.split)
        assert all(len(found) == 1 for found in sides.values())
    merged = Fingerprint.load(tmp_path / "run" / "fingerprint.json")
    assert merged.sites.keys() == {"a", "b", "c"}
    with pytest.raises(ConfigError, match="--resume"):
        simulate_federation(None, overrides(table), out=tmp_path / "run")


def test_a_run_that_was_cut_ends_as_if_it_had_not_been(table: Path, tmp_path: Path) -> None:
    sections = {
        "model": {"name": "mlp", "feature_size": 8, "dropout": 0.2},
        "federation": {"rounds": 5, "compression": "int8", "strategy": "fedadam"},
    }
    found = []
    for name in ("whole", "cut"):
        recipe, folders, spec = prepared(table, tmp_path / name, **sections)
        if name == "cut":

            def stop(number: int, _: Any) -> None:
                if number == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                rounds(tmp_path / name, recipe, folders, spec, tell=stop)
        found.append(rounds(tmp_path / name, recipe, folders, spec))
    for name, value in found[0].weights.items():
        assert np.array_equal(value, found[1].weights[name]), name
    assert [entry["round"] for entry in found[1].history] == [1, 2, 3, 4, 5]


def test_fedbn_keeps_norms_and_named_heads_at_their_site(table: Path, tmp_path: Path) -> None:
    sections = {
        "model": {"name": "mlp", "feature_size": 8},
        "federation": {"rounds": 2, "strategy": "fedbn", "local": ["head.*"]},
    }
    recipe, folders, spec = prepared(table, tmp_path, **sections)
    result = rounds(tmp_path, recipe, folders, spec)
    names = set(new_model(spec, recipe.manifest).state_dict())
    assert names - set(result.weights) == {
        "body.1.weight",
        "body.1.bias",
        "body.5.weight",
        "body.5.bias",
        "head.weight",
        "head.bias",
    }
    kept = [run_folder(Path(folder.directory), recipe_digest(spec), result.run) for folder in folders]
    own = [kept_state(folder)["own"] for folder in kept]
    assert not np.array_equal(own[0]["head.weight"].numpy(), own[1]["head.weight"].numpy())


def test_one_site_is_plain_training_and_the_pull_holds_it_back(table: Path, tmp_path: Path) -> None:
    moved = {}
    for mu in (0.0, 5.0):
        sections = {
            "model": {"name": "linear"},
            "optim": {"name": "sgd", "lr": 0.1},
            "federation": {"rounds": 1, "local_epochs": 5, "quorum": 3, "strategy": "fedprox", "proximal_mu": mu},
        }
        recipe, folders, spec = prepared(table, tmp_path / str(mu), **sections)
        moved[mu] = float(np.linalg.norm(rounds(tmp_path / str(mu), recipe, folders, spec).weights["head.weight"]))
    assert 0 < moved[5.0] < 0.5 * moved[0.0]


def test_private_sites_tell_no_figure_and_measured_normalisation_is_refused(table: Path, tmp_path: Path) -> None:
    privacy = {"epsilon": 5.0, "delta": 1e-3, "metric_noise": None, "mode": "hooks", "accountant": "rdp"}
    sections = {"model": {"name": "linear"}, "privacy": privacy, "federation": {"rounds": 2, "local_steps": 2}}
    sections["train"] = {"batch_size": 8}
    recipe, folders, spec = prepared(table, tmp_path, **sections)
    result = rounds(tmp_path, recipe, folders, spec)
    for entry in result.history:
        assert {row["state"] for row in entry["sites"].values()} == {"ok"}
        assert all(row["state"] == "ok" and not any(row[name] for name in FIGURES) for row in entry["sites"].values())
    assert result.metrics == {}
    # A question that was answered is answered alike; another one for the same round would be paid for again.
    site = folders[0].open()
    model = new_model(spec, recipe.manifest)
    text = {"experiment": spec.model_dump(mode="json"), "run": result.run, "round": 1}
    with pytest.raises(PrivacyError, match="answered before"):
        site("train", Parcel(text=text, arrays=arrays_of(model, shared_names(model, spec.federation))))
    other = tmp_path / "twice"
    recipe, folders, spec = prepared(table, other, **sections)
    site, first = (
        folders[0].open(),
        Parcel(text=text | {"round": 0}, arrays=arrays_of(model, shared_names(model, spec.federation))),
    )
    once, again = site("train", first), site("train", first)
    assert all(np.array_equal(value, again.arrays[name]) for name, value in once.arrays.items())
    more = {"privacy__epsilon": "3", "privacy__delta": "1e-3"}
    with pytest.raises(PrivacyError, match=r"preprocess\.mean"):
        simulate_federation(None, overrides(table, **more), out=tmp_path / "refused")


def test_a_simulation_may_plan_from_noised_sums_as_a_network_does(table: Path, tmp_path: Path) -> None:
    sections = {"model": {"name": "linear"}, "federation": {"fingerprint_epsilon": 100.0}}
    recipe, folders, _ = prepared(table, tmp_path, **sections)
    seen = len({case.group for case in recipe.manifest.cases if case.split != "test"})
    assert recipe.fingerprint.patients == pytest.approx(seen, abs=5) and not recipe.fingerprint.sites
    assert all((Path(folder.directory) / "fingerprint.json").is_file() for folder in folders)
    with pytest.raises(FederationError, match="exceeds the noise"):
        prepared(table, tmp_path / "small", **{**sections, "federation": {"fingerprint_epsilon": 0.5}})


def test_scaffold_brings_sites_that_pull_apart_together(table: Path, tmp_path: Path) -> None:
    """With many steps a round, it comes nearer to what all data together would have than the mean alone does."""
    weights = {}
    for strategy, steps, count in (("fedavg", 1, 150), ("fedavg", 30, 5), ("scaffold", 30, 5)):
        sections = {
            "model": {"name": "linear"},
            "optim": {"name": "sgd", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.05},
            "schedule": {"name": "constant", "warmup": 0.0},
            "train": {"batch_size": 200},
            "federation": {"rounds": count, "local_steps": steps, "strategy": strategy, "quorum": 3},
        }
        recipe, folders, spec = prepared(table, tmp_path / f"{strategy}{steps}", **sections)
        found = rounds(tmp_path / f"{strategy}{steps}", recipe, folders, spec)
        weights[strategy, steps] = np.concatenate([value.ravel() for value in found.weights.values()])
    goal = weights["fedavg", 1]  # one full step a round is gradient descent on all data together
    apart, together = (float(np.linalg.norm(weights[s, 30] - goal)) for s in ("fedavg", "scaffold"))
    assert together < 0.5 * apart


def test_the_servers_sum_gives_the_model_that_the_updates_would_have(table: Path, tmp_path: Path) -> None:
    found: dict[str, Federated] = {}
    for name, more in {
        "plain": {},
        "secret": {"secure_aggregation": True},
        "noised": {"secure_aggregation": True, "privacy": {"epsilon": 8.0, "delta": 1e-2}},
    }.items():
        sections = {
            "model": {"name": "linear"},
            "optim": {"name": "sgd", "lr": 0.1},
            "federation": {"rounds": 3, "quorum": 3, **more},
        }
        recipe, folders, spec = prepared(table, tmp_path / name, **sections)
        found[name] = rounds(tmp_path / name, recipe, folders, spec)
    for name, value in found["plain"].weights.items():
        assert np.abs(value - found["secret"].weights[name]).max() < 1e-6, name
        assert np.abs(value - found["noised"].weights[name]).max() > 1e-3, "here is noise"
    sites = len(found["plain"].history[0]["sites"])
    assert [entry["summed"] for entry in found["secret"].history] == [sites] * 3
    for entry in found["noised"].history:
        assert all(row["state"] == "ok" and not any(row[name] for name in FIGURES) for row in entry["sites"].values())
        assert entry["clip"] > 0
    assert found["noised"].metrics == {} and found["secret"].metrics["val/auc"] > 0.8


@pytest.mark.timeout(1200)  # Ray's workers are nicer still than whoever starts them
def test_on_ray_and_under_secure_aggregation_sites_come_to_what_they_do_here(table: Path, tmp_path: Path) -> None:
    """In a process of its own: Flower ends the Ray session that it has used."""
    outcomes = []
    for engine, secure in (("here", "false"), ("ray", "true")):
        settings = {"federation__quorum": "3", "federation__secure_aggregation": secure}
        words = [*overrides(table, federation__rounds="2", **settings), "--out", engine]
        words += ["--engine", engine, "--no-compare"]
        command = [sys.executable, "-m", "medray", "federate", "simulate", *words]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outcomes.append(json.loads((tmp_path / engine / "outcome.json").read_text())["metrics"]["log_loss"][0])
    assert outcomes[0] == pytest.approx(outcomes[1], abs=1e-5)
    page = (tmp_path / "ray" / "report.html").read_text(encoding="utf-8")
    assert "the server learns the sum" in page and "no differential privacy" in page
