"""What a site keeps between runs, and what it settles before it reads an image; and private rounds from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray.config.federation_files import SiteConfig
from medray.config.schema import Experiment
from medray.data.checks import check
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import FederationError, PrivacyError, WithheldError
from medray.learn.aggregation.mean import Weights
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.policy import recipe_digest
from medray.privacy.secagg.identity import Signer
from medray.workflows.federation import site as sites
from medray.workflows.federation.attending import Guard
from medray.workflows.federation.keeping import RUNS, run_folder
from medray.workflows.federation.rounds import Rounds
from medray.workflows.federation.sealing import KeptBackError
from medray.workflows.federation.shared import arrays_of, shared_names, statistics_of
from medray.workflows.federation.site import SiteFolder, SiteWorker
from medray.workflows.training import new_model

PRIVATE = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "metric_noise": None,
    "mode": "hooks",
    "accountant": "rdp",
    "noise_multiplier": 4.0,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    rng = np.random.default_rng(0)
    lines = ["patient,age,marker,label"]
    for row in range(60):
        age, marker = rng.normal(), rng.normal()
        lines.append(f"p{row},{age:.3f},{marker:.3f},{int(age + 2 * marker > 0)}")
    path = tmp_path_factory.mktemp("table") / "cases.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return check(build_manifest(f"{path}?columns=age,marker"))


def spec(**sections: Any) -> Experiment:
    tree: dict[str, Any] = {
        "data": "-",
        "device": "cpu",
        "model": {"name": "linear"},
        "loss": {"name": "cross_entropy"},
        "optim": {"lr": 0.1},
        "train": {"batch_size": 8, "precision": "fp32", "checkpointing": "off", "budget": None},
        "preprocess": {"normalize": "columns", "mean": [0.0, 0.0], "std": [1.0, 1.0]},
        "federation": {"rounds": 3, "local_steps": 2, "quorum": 2},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return Experiment.model_validate(tree)


def place(manifest: Manifest, folder: Path, name: str = "kiel") -> SiteFolder:
    manifest.save(folder / "site" / "manifest.json")
    return SiteFolder(name=name, directory=str(folder / "site"), cache=str(folder / "cache"))


def ask(manifest: Manifest, experiment: Experiment, number: int = 0, run: str = "a") -> Parcel:
    model = new_model(experiment, manifest)
    text = {"experiment": experiment.model_dump(mode="json"), "run": run * 32, "round": number}
    return Parcel(text=text, arrays=arrays_of(model, shared_names(model, experiment.federation)))


def test_private_rounds_from_end_to_end(table: Manifest, tmp_path: Path) -> None:
    """Real guards around real training: every round is charged, and nothing but weights leaves, to the last look."""
    experiment, left = spec(privacy=PRIVATE), []
    guards = []
    for name in ("kiel", "jena"):
        tree = {"federation": "f", "name": name, "server": "localhost:1", "data": "-", "fewest": 10}
        rules = SiteConfig.model_validate(tree).at(tmp_path / name)
        guards.append(Guard(rules, table, place(table, rules.work, name)))

    def opened(number: int) -> Callable[[Kind, Parcel], Parcel]:
        def answer(kind: Kind, parcel: Parcel) -> Parcel:
            found = guards[number](kind, parcel)
            left.append((kind, dict(found.text), set(found.arrays)))
            return found

        return answer

    model = new_model(experiment, table)
    start = arrays_of(model, shared_names(model, experiment.federation))
    made = Rounds(
        in_process(opened, 2), tmp_path, experiment, start, statistics_of(model), objective=("val/auc", "max")
    )
    found = made.run(("kiel", "jena"))
    assert [{row["state"] for row in entry["sites"].values()} for entry in found.history] == [{"ok"}] * 3
    assert found.best_round == 3 and not np.array_equal(found.weights["head.weight"], start["head.weight"])
    assert [entry for entry in left if entry[0] == "train"] == [("train", {}, set(start))] * 6
    assert [entry for entry in left if entry[0] == "evaluate"] == [("evaluate", {}, set())] * 2
    for guard in guards:
        (entry,) = guard.ledger.entries()
        assert entry.reservation.history[0][2] == 6, "all steps of the run, once"
        assert 0 < guard.ledger.spent().epsilon <= 2.0


@pytest.mark.parametrize("privacy", [PRIVATE, {}])
def test_what_another_run_left_counts_for_nothing(table: Manifest, tmp_path: Path, privacy: dict[str, Any]) -> None:
    """A run after a compressed one with weights of its own trains as if it were the first."""
    before = spec(
        optim={"name": "sgd", "momentum": 0.9}, federation={"compression": "topk", "top": 0.3, "local": ["head.bias"]}
    )
    after = spec(privacy=privacy, federation={"compression": "topk", "top": 0.3})
    used, fresh = SiteWorker(place(table, tmp_path / "used")), SiteWorker(place(table, tmp_path / "fresh"))
    for number in range(3):
        used("train", ask(table, before, number))
    seen = []
    for worker in (used, SiteWorker(place(table, tmp_path / "used")), fresh):
        seen.append([worker("train", ask(table, after, number)) for number in range(2)])
    for first, again in zip(seen[0], seen[1], strict=True):  # and a site that was started anew repeats its answers
        assert all(np.array_equal(value, again.arrays[name]) for name, value in first.arrays.items())
    if not privacy:  # else noise is drawn, and no two are alike
        for first, new in zip(seen[0], seen[2], strict=True):
            assert all(np.array_equal(value, new.arrays[name]) for name, value in first.arrays.items())


def test_runs_at_once_do_not_meet(table: Manifest, tmp_path: Path) -> None:
    """In turn, of two recipes and of one: each goes on with its own optimiser, as if the site had no other run."""
    one = spec(optim={"name": "sgd", "momentum": 0.9}, federation={"compression": "topk", "top": 0.3})
    other = spec(optim={"lr": 0.01}, federation={"local": ["head.bias"]})
    runs = [(one, "a"), (one, "b"), (other, "a")]
    busy = SiteWorker(place(table, tmp_path / "busy"))
    seen: dict[int, list[Parcel]] = {0: [], 1: [], 2: []}
    for number in range(3):
        for k, (experiment, run) in enumerate(runs):
            seen[k].append(busy("train", ask(table, experiment, number, run)))
    for k, (experiment, run) in enumerate(runs):
        alone = SiteWorker(place(table, tmp_path / f"alone{k}"))
        for number, answer in enumerate(seen[k]):
            wanted = alone("train", ask(table, experiment, number, run))
            assert all(np.array_equal(value, wanted.arrays[name]) for name, value in answer.arrays.items()), (k, number)
        again = SiteWorker(place(table, tmp_path / "busy"))("train", ask(table, experiment, 2, run))
        assert again.arrays.keys() == seen[k][2].arrays.keys() and again.text == seen[k][2].text


def test_the_runs_asked_for_last_are_kept_and_a_forgotten_one_begins_anew(table: Manifest, tmp_path: Path) -> None:
    experiment, said = spec(optim={"name": "sgd", "momentum": 0.9}), []
    worker = SiteWorker(place(table, tmp_path), note=said.append)
    first = worker("train", ask(table, experiment, 0, "0"))
    for run in range(1, RUNS):
        worker("train", ask(table, experiment, 0, f"{run:x}"))
    worker("train", ask(table, experiment, 1, "0"))  # asked for again: now run 1 is the one of longest ago
    folders = {run: run_folder(worker.directory, recipe_digest(experiment), f"{run:x}" * 32) for run in range(RUNS)}
    assert all(folder.is_dir() for folder in folders.values()) and not said
    worker("train", ask(table, experiment, 0, "f"))
    assert [run for run, folder in folders.items() if not folder.is_dir()] == [1]
    assert len(said) == 1 and folders[1].name in said[0]
    again = worker("train", ask(table, experiment, 0, "1"))
    assert all(np.array_equal(value, first.arrays[name]) for name, value in again.arrays.items())


def test_a_private_round_is_answered_once_in_a_run_and_paid_for_in_each(table: Manifest, tmp_path: Path) -> None:
    experiment, charged = spec(privacy=PRIVATE), []
    worker = SiteWorker(place(table, tmp_path), charge=lambda _, steps: charged.append(steps))
    worker("train", ask(table, experiment, 0))
    worker("train", ask(table, experiment, 0))  # the same question: the same answer
    parcel = ask(table, experiment, 0)
    other = Parcel(text=parcel.text, arrays={name: value + 1 for name, value in parcel.arrays.items()})
    with pytest.raises(PrivacyError, match="round 1 was trained and answered before"):
        worker("train", other)
    worker("train", ask(table, experiment, 0, "b"))
    assert [steps for steps in charged if steps] == [2, 2]
    with pytest.raises(FederationError, match="names its run"):
        worker("train", Parcel(text={**parcel.text, "run": "../../etc"}, arrays=parcel.arrays))


def test_a_run_of_another_network_begins_anew(table: Manifest, tmp_path: Path) -> None:
    worker = SiteWorker(place(table, tmp_path))
    worker("train", ask(table, spec(), 0))
    other = spec(model={"name": "mlp", "feature_size": 8})
    assert worker("train", ask(table, other, 1)).text["steps"] == 2


def test_what_may_not_be_paid_for_is_refused_before_an_image_is_read(
    table: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("the data were touched")

    asked: list[tuple[int, int]] = []

    def charge(plan: PrivacyPlan, steps: int) -> None:
        asked.append((plan.steps, steps))
        raise PrivacyError("over budget")

    monkeypatch.setattr(sites.PreparedStore, "open_or_build", opened)
    worker = SiteWorker(place(table, tmp_path), charge=charge)
    with pytest.raises(PrivacyError, match="over budget"):
        worker("train", ask(table, spec(privacy=PRIVATE)))
    assert asked == [(6, 0)], "the whole run, of which nothing is made yet"
    assert worker("evaluate", ask(table, spec(privacy=PRIVATE))).text == {"metrics": {}, "judged": 0}


def test_a_last_look_costs_nothing_and_a_site_that_never_trained_reads_nothing_for_it(
    table: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    notes: list[str] = []
    experiment = spec(privacy=PRIVATE, federation={"local": ["head.bias"]})

    def worker() -> SiteWorker:
        return SiteWorker(
            place(table, tmp_path),
            charge=lambda _, steps: charged.append(steps),
            note=notes.append,
            models=tmp_path / "models",
        )

    with monkeypatch.context() as patched:
        patched.setattr(sites.PreparedStore, "open_or_build", lambda *_: 1 / 0)
        assert worker()("evaluate", ask(table, experiment, 3)).text == {"metrics": {}, "judged": 0}
    assert charged == [] and "trained in no round" in notes[0]
    for number in range(3):
        worker()("train", ask(table, experiment, number))
    before = list(charged)
    worker()("evaluate", ask(table, experiment, 3))
    assert charged == before and "its own model is" in notes[-1]


def test_a_sites_finished_model_is_not_replaced_by_other_weights(table: Manifest, tmp_path: Path) -> None:
    notes: list[str] = []
    experiment = spec(federation={"local": ["head.bias"]})
    worker = SiteWorker(place(table, tmp_path), note=notes.append, models=tmp_path / "models")
    for number in range(3):
        worker("train", ask(table, experiment, number))
    last = ask(table, experiment, 3)
    worker("evaluate", last)
    [bundle] = (tmp_path / "models").glob("*/bundle.json")
    made = bundle.stat().st_mtime_ns
    other = Parcel(text=last.text, arrays={name: value + 1 for name, value in last.arrays.items()})
    with pytest.raises(FederationError, match="made of other weights"):
        worker("evaluate", other)
    assert worker("evaluate", last).text["judged"] > 0 and bundle.stat().st_mtime_ns == made
    digest = bundle.parent.with_name(f"{bundle.parent.name}.sha256").read_text(encoding="utf-8").strip()
    assert len(notes) == 1 and digest in notes[0]


def test_under_secure_aggregation_one_question_of_a_round_is_answered(table: Manifest, tmp_path: Path) -> None:
    """Of two sums with other sites in them, the difference could be one site's update."""
    experiment = spec(federation={"secure_aggregation": True, "quorum": 3})

    def asked(number: int, *, run: str = "a", more: float = 0.0) -> Parcel:
        parcel = ask(table, experiment, number)
        arrays = {name: value + np.float32(more) for name, value in parcel.arrays.items()}
        return Parcel(text={**parcel.text, "run": run * 32}, arrays=arrays)

    def worker() -> SiteWorker:
        return SiteWorker(place(table, tmp_path))

    first = worker()("train", asked(0)).text["keys"]
    assert worker()("train", asked(0)).text["keys"] == first, "to the same, the same"
    for other in (asked(0, more=0.1), asked(0, run="b")):
        with pytest.raises(PrivacyError, match="round 1 in other words"):
            worker()("train", other)
    # What was answered is lost, but nothing was told with the keys: it trains again.
    kept = run_folder(tmp_path / "site", recipe_digest(experiment), "a" * 32)
    (kept / "state-0.pt").unlink()
    again = worker()("train", asked(0)).text["keys"]
    assert again != first
    shares = {**asked(0).text, "ask": "shares", "roster": {"kiel": again}}
    with pytest.raises(FederationError, match="too few to hide"):
        worker()("query", Parcel(text=shares))
    for number in (1, 2):
        worker()("train", asked(number))
    for earlier in (asked(0), asked(1, more=0.1)):  # of two rounds ago no state says so any more
        with pytest.raises(PrivacyError, match="round 3 of this recipe was answered before"):
            worker()("train", earlier)
    with pytest.raises(FederationError, match="names its run"):
        worker()("train", asked(2, run="zz"))


def test_what_can_not_leave_is_not_paid_for_twice(table: Manifest, tmp_path: Path) -> None:
    """Nor at all, where the site has nothing to sign with."""
    charged: list[int] = []
    federation = {"secure_aggregation": True, "quorum": 3, "max_norm": 1e-9}
    parcel = ask(table, spec(privacy=PRIVATE, federation=federation))

    def none() -> Signer:
        raise FederationError("node.crt: expired")

    def worker(signer: Callable[[], Signer] | None = None) -> SiteWorker:
        return SiteWorker(place(table, tmp_path), charge=lambda _, steps: charged.append(steps), signer=signer)

    with pytest.raises(FederationError, match="expired"):
        worker(none)("train", parcel)
    assert charged == []
    with pytest.raises(KeptBackError, match="too long") as found:
        worker()("train", parcel)
    assert "its norm" in found.value.exactly and "norm 0" not in str(found.value)
    with pytest.raises(FederationError, match="too long"):
        worker()("train", parcel)
    assert charged == [0, 2], "the second time it says the same, and trains nothing"


@pytest.mark.parametrize("optim", [{"lr": 0.1}, {"name": "adam"}, {"name": "sgd", "lr": 0.5, "clip_norm": 1.0}])
def test_a_site_that_nobody_can_check_keeps_back_a_first_update_that_no_recipe_makes(
    table: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: dict[str, Any]
) -> None:
    """Real training passes; with a fault that makes a hundredfold of it, it does not."""
    experiment = spec(optim=optim, federation={"secure_aggregation": True, "quorum": 3, "local_steps": 20})
    assert "keys" in SiteWorker(place(table, tmp_path / "good"))("train", ask(table, experiment)).text

    def blown(sent: Weights, *_: Any) -> tuple[Weights, Weights]:
        for value in sent.values():
            value *= 100
        return sent, {}

    monkeypatch.setattr(sites, "compress", blown)
    with pytest.raises(KeptBackError, match="first round") as found:
        SiteWorker(place(table, tmp_path / "bad"))("train", ask(table, experiment))
    assert "as far as this recipe" in found.value.exactly


def test_under_noise_at_the_server_and_under_masks_no_count_leaves(table: Manifest, tmp_path: Path) -> None:
    central = spec(federation={"privacy": {"epsilon": 5.0, "delta": 1e-3}})
    text = SiteWorker(place(table, tmp_path / "central"))("train", ask(table, central)).text
    assert text == {"metrics": {}, "judged": 0}
    parcel = ask(table, spec(federation={"secure_aggregation": True, "quorum": 3}))
    text = SiteWorker(place(table, tmp_path / "masked"))("train", parcel).text
    assert text.keys() == {"metrics", "judged", "loss", "keys"}


def test_scaffold_corrects_each_step_and_its_controls_meet_at_the_server(table: Manifest, tmp_path: Path) -> None:
    plain = {
        "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup": 0.0},
    }
    how = {"strategy": "scaffold", "local_steps": 1}
    experiment, without = spec(**plain, federation=how), spec(**plain, federation={"local_steps": 1})
    parcel = ask(table, experiment)
    c = {name: np.full_like(value, 0.5) for name, value in parcel.arrays.items()}
    asked = Parcel(
        text=parcel.text, arrays={**parcel.arrays, **{f"correction/{name}": value for name, value in c.items()}}
    )
    bare = SiteWorker(place(table, tmp_path / "bare"))("train", ask(table, without)).arrays
    corrected = SiteWorker(place(table, tmp_path / "corrected"))("train", asked).arrays
    for name, value in bare.items():
        assert np.allclose(corrected[name], value - 0.1 * c[name], atol=1e-6)
    with pytest.raises(FederationError, match="don't fit"):
        SiteWorker(place(table, tmp_path / "none"))("train", parcel)
    # Of two sites alike in size: what one is pulled by, the other is pushed by.
    folders = tuple(place(table, tmp_path / name, name) for name in ("jena", "kiel"))
    other = table.model_copy(update={"cases": tuple(c.model_copy(update={"label": 1 - c.label}) for c in table.cases)})
    other.save(Path(folders[1].directory) / "manifest.json")
    model = new_model(experiment, table)
    start = arrays_of(model, shared_names(model, experiment.federation))
    made = Rounds(
        in_process(sites.opener(folders), 2),
        tmp_path / "run",
        experiment,
        start,
        frozenset(),
        objective=("val/auc", "max"),
    )
    made.run(("jena", "kiel"))
    jena, kiel = (made.aggregator.correction(made.weights, name) for name in ("jena", "kiel"))
    for name, value in jena.items():
        assert np.abs(value).max() > 1e-3
        assert np.allclose(value, -kiel[name], atol=1e-6)


def test_too_few_patients_neither_train_nor_validate(
    table: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = spec()
    parts = make_splits(table, experiment.split, experiment.split.seed)
    train, val = len(parts.train), len(parts.val)
    assert 1 < val < train
    place(table, tmp_path)
    for fewest, judged in ((val, val), (val + 1, 0)):
        worker = SiteWorker(place(table, tmp_path), fewest=fewest)
        answer = worker("evaluate", ask(table, experiment))
        assert answer.text["judged"] == judged and bool(answer.text["metrics"]) == bool(judged)
    SiteWorker(place(table, tmp_path), fewest=train)("train", ask(table, experiment))
    monkeypatch.setattr(sites.PreparedStore, "open_or_build", lambda *_: 1 / 0)
    with pytest.raises(WithheldError, match=f"patients that would train are fewer than fewest={train + 1}") as told:
        SiteWorker(place(table, tmp_path / "new"), fewest=train + 1)("train", ask(table, experiment))
    assert f"{train} patients" in told.value.exactly and f"{train} patients" not in str(told.value)
