"""The server's rounds against sites that are late, broken or hostile, and a server that dies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import FederationError
from medray.learn.aggregation.mean import Weights
from medray.workflows.federation.rounds import Federated, Rounds

GOAL = {"a": 1.0, "b": 3.0, "c": 5.0}
"""Where each site pulls the one weight."""

Bad = Callable[[int, Parcel], Parcel | None]
FREE = {"name": "sgd", "clip_norm": 0.0}
"""A recipe that says nothing of how far an update may reach: these sites go as far as they like."""


class FakeHub:
    """Sites that each go half the way to their goal; ``bad`` bends one site's answer: (round, answer) to another."""

    def __init__(self, bad: Mapping[str, Bad] | None = None) -> None:
        self.bad, self.asked = dict(bad or {}), 0

    def sites(self) -> tuple[str, ...]:
        return tuple(GOAL)

    def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        self.asked += 1
        found = {}
        for name, parcel in parcels.items():
            w = parcel.arrays["w"]
            error = float(abs(w[0] - 3.0))
            text: dict[str, Any] = {"metrics": {"val/error": error}, "judged": 4}
            if kind == "train":
                text |= {"cases": 10, "steps": 1, "loss": error, "seconds": 0.1}
            answer: Parcel | None = Parcel(text=text, arrays={"w": ((GOAL[name] - w) / 2).astype(np.float32)}, size=100)
            if kind == "train" and name in self.bad and answer is not None:
                answer = self.bad[name](int(parcel.text["round"]), answer)
            if answer is not None:
                found[name] = answer
        return found


def start() -> Weights:
    return {"w": np.array([-5.0, -5.0], np.float32)}


def rounds(directory: Path, hub: FakeHub, **options: Any) -> Rounds:
    federation = {"rounds": 6, "quorum": 2, "attempts": 2, "deadline": 1.0, **options}
    notes: list[str] = []
    made = Rounds(
        hub,
        directory,
        Experiment.model_validate({"federation": federation, "optim": federation.pop("optim", FREE)}),
        start(),
        frozenset(),
        objective=("val/error", "min"),
        note=notes.append,
    )
    made.notes = notes  # type: ignore[attr-defined]
    return made


def run(directory: Path, hub: FakeHub, **options: Any) -> Federated:
    return rounds(directory, hub, **options).run(tuple(GOAL))


def bend(**arrays: Any) -> Bad:
    return lambda _, answer: Parcel(text=answer.text, arrays={**answer.arrays, **arrays}, size=answer.size)


def test_good_sites_meet_in_the_middle_and_the_best_round_is_kept(tmp_path: Path) -> None:
    found = run(tmp_path, FakeHub())
    assert found.best_round == 6 and found.weights["w"] == pytest.approx([3 - 8 / 2**6] * 2)
    assert found.metrics["val/error"] == pytest.approx(8 / 2**6)
    first = found.history[0]
    assert first["metrics_before"]["val/error"] == pytest.approx(8.0) and first["up"] == 300 and first["down"] > 24
    assert found.history[-1]["last"]["sites"].keys() == GOAL.keys()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (bend(w=np.array([np.nan, 0], np.float32)), "NaN"),
        (bend(w=np.zeros(3, np.float32)), "shape"),
        (bend(w=np.zeros(2)), "float64"),
        (bend(x=np.zeros(2, np.float32)), "unknown 'x'"),
        (lambda _, a: Parcel(text=a.text, arrays={}), "lacks 'w'"),
        (lambda _, a: Parcel(text=a.text, arrays={"w": np.float32(100) * a.arrays["w"]}), "times the usual"),
        (lambda _, a: Parcel(text={**a.text, "cases": -3}, arrays=a.arrays), "number of cases"),
        (lambda _, a: Parcel(text={**a.text, "metrics": {"val/error": float("nan")}}, arrays=a.arrays), "metrics"),
        (lambda _, a: Parcel(text={**a.text, "loss": "low"}, arrays=a.arrays), "loss"),
        (lambda _, a: Parcel(text={**a.text, "loss": 10**400}, arrays=a.arrays), "loss"),
        (lambda _, a: Parcel(text={**a.text, "metrics": {"val/error": -(10**400)}}, arrays=a.arrays), "metrics"),
        (lambda _, a: Parcel(text={**a.text, "metrics": {"a\nb": 0.0}}, arrays=a.arrays), "names"),
        (
            lambda _, a: Parcel(text={**a.text, "metrics": dict.fromkeys(map(str, range(101)), 0)}, arrays=a.arrays),
            "100",
        ),
        (lambda _, a: Parcel(text={**a.text, "judged": "x" * 10**6}, arrays=a.arrays), "judged=a str"),
        (lambda _, a: Parcel(text=a.text, arrays={"w": {}}), "can't be read"),  # type: ignore[dict-item]
    ],
)
def test_a_bad_update_is_quarantined_named_and_moves_nothing(tmp_path: Path, bad: Bad, said: str) -> None:
    found = run(tmp_path, FakeHub({"c": bad}))
    for entry in found.history:
        assert entry["sites"]["c"]["state"] == "quarantined" and said in entry["sites"]["c"]["reason"]
        assert entry["sites"]["a"]["state"] == entry["sites"]["b"]["state"] == "ok"
    assert found.weights["w"] == pytest.approx([2.0, 2.0], abs=0.5)


def test_a_variance_below_nothing_is_quarantined_however_short_the_update(tmp_path: Path) -> None:
    class Normed(FakeHub):
        def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
            found = super().ask(kind, parcels, deadline)
            for name, answer in found.items() if kind == "train" else ():
                moved = np.array([-3.0 if name == "a" else -0.5], np.float32)
                arrays = {**answer.arrays, "norm.running_var": moved}
                found[name] = Parcel(text=answer.text, arrays=arrays, size=answer.size)
            return found

    made = rounds(tmp_path, Normed(), rounds=1)
    made.weights = made.best_weights = {**start(), "norm.running_var": np.ones(1, np.float32)}
    [entry] = made.run(tuple(GOAL)).history
    assert entry["sites"]["a"]["state"] == "quarantined" and "isn't negative" in entry["sites"]["a"]["reason"]
    assert made.weights["norm.running_var"] == pytest.approx([0.5])


def test_the_late_and_the_failed_miss_their_round_alone(tmp_path: Path) -> None:
    late: Bad = lambda number, answer: None if number == 1 else answer  # noqa: E731
    failed: Bad = lambda number, answer: Parcel(error="disk full") if number == 2 else answer  # noqa: E731
    found = run(tmp_path, FakeHub({"a": late, "b": failed}))
    states = [{name: row["state"] for name, row in entry["sites"].items()} for entry in found.history]
    assert states[1] == {"a": "late", "b": "ok", "c": "ok"} and states[2] == {"a": "ok", "b": "failed", "c": "ok"}
    assert all(set(state.values()) == {"ok"} for k, state in enumerate(states) if k not in (1, 2))
    assert found.history[2]["sites"]["b"]["reason"] == "disk full"


def test_below_the_quorum_it_waits_then_says_for_whom(tmp_path: Path) -> None:
    silent: Bad = lambda _, answer: None  # noqa: E731
    hub = FakeHub({"a": silent, "b": bend(w=np.full(2, np.inf, np.float32))})
    made = rounds(tmp_path, hub)
    with pytest.raises(FederationError, match=r"1 of the 2 good updates.*a \(late.*b \(quarantined.*--resume"):
        made.run(tuple(GOAL))
    assert hub.asked == 2 and "waiting for the quorum" in made.notes[1]  # type: ignore[attr-defined]


def test_the_quorum_may_be_reached_on_a_later_attempt(tmp_path: Path) -> None:
    turns = iter([None, "ok"])
    flaky: Bad = lambda number, answer: answer if number or next(turns) else None  # noqa: E731
    found = run(tmp_path, FakeHub({"a": flaky}), quorum=3)
    assert found.history[0]["attempts"] == 2 and found.history[0]["sites"]["a"]["state"] == "ok"
    with pytest.raises(FederationError, match=r"federation\.quorum"):
        run(tmp_path / "more", FakeHub(), quorum=4)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "median"])
def test_a_server_that_died_goes_on_at_the_round_it_lost(tmp_path: Path, strategy: str) -> None:
    whole = run(tmp_path / "whole", FakeHub(), strategy=strategy)

    def die(number: int, answer: Parcel) -> Parcel:
        if number == 3:
            raise KeyboardInterrupt
        return answer

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", FakeHub({"b": die}), strategy=strategy)
    hub = FakeHub()
    again = run(tmp_path / "cut", hub, strategy=strategy)
    assert hub.asked == 4  # three rounds and the last look
    assert np.array_equal(again.weights["w"], whole.weights["w"]) and len(again.history) == 6
    finished = FakeHub()
    assert np.array_equal(run(tmp_path / "cut", finished, strategy=strategy).weights["w"], whole.weights["w"])
    assert finished.asked == 0


def test_damaged_files_and_other_experiments_are_refused(tmp_path: Path) -> None:
    run(tmp_path, FakeHub())
    with pytest.raises(FederationError, match="another experiment"):
        run(tmp_path, FakeHub(), strategy="median")
    (tmp_path / "rounds" / "00006.safetensors").write_bytes(b"nothing")
    with pytest.raises(FederationError, match="can't be read"):
        run(tmp_path, FakeHub())


def test_a_share_of_the_sites_is_drawn_anew_each_round(tmp_path: Path) -> None:
    found = run(tmp_path, FakeHub(), fraction=0.67, rounds=8)
    asked = [tuple(entry["sites"]) for entry in found.history]
    assert {len(names) for names in asked} == {2} and len(set(asked)) > 1


def said(**text: Any) -> Bad:
    return lambda _, answer: Parcel(text={**answer.text, **text}, arrays=answer.arrays, size=answer.size)


def test_what_a_site_says_of_its_size_counts_within_a_bound(tmp_path: Path) -> None:
    """Of 10, 10 and 10**9 cases, c's count as 100: its pull is 100 of 120."""
    found = run(tmp_path, FakeHub({"c": said(cases=10**9)}), rounds=40)
    assert found.history[0]["sites"]["c"]["state"] == "ok"
    last = Rounds(
        FakeHub(),
        tmp_path,
        Experiment.model_validate(
            {"federation": {"rounds": 40, "quorum": 2, "attempts": 2, "deadline": 1.0}, "optim": FREE}
        ),
        start(),
        frozenset(),
        objective=("val/error", "min"),
    )
    last._resume()
    assert last.weights["w"] == pytest.approx([(1 * 10 + 3 * 10 + 5 * 100) / 120] * 2, abs=1e-3)


def test_under_privacy_all_sites_count_alike_and_no_figure_is_needed(tmp_path: Path) -> None:
    """A protected answer has no text at all, also to the last look."""

    class Silent(FakeHub):
        def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
            found = super().ask(kind, parcels, deadline)
            bare = {name: Parcel(arrays=answer.arrays if kind == "train" else {}) for name, answer in found.items()}
            if kind == "train":  # one that says more than it was asked for
                bare["c"] = Parcel(text={"cases": 10**9}, arrays=bare["c"].arrays)
            return bare

    experiment = Experiment.model_validate(
        {
            "federation": {"rounds": 40, "quorum": 2},
            "privacy": {"epsilon": 1.0},
            "train": {"precision": "fp32"},
            "optim": FREE,
        }
    )
    found = Rounds(Silent(), tmp_path, experiment, start(), frozenset(), objective=("val/error", "min")).run(
        tuple(GOAL)
    )
    assert found.weights["w"] == pytest.approx([3.0, 3.0], abs=1e-3) and found.best_round == 40
    assert found.metrics == {} and found.history[-1]["last"]["sites"] == {"a": {}, "b": {}, "c": {}}


class Crowd:
    """Sites whose first steps are Adam's: each entry moves by a tenth to all of the learning rate, .001, in each."""

    def __init__(self, honest: int, hostile: int, lie: Mapping[str, Any] | None = None) -> None:
        self.names = tuple([f"good{k:02d}" for k in range(honest)] + [f"hostile{k:02d}" for k in range(hostile)])
        self.steps, self.lie = 10, dict(lie or {})

    def sites(self) -> tuple[str, ...]:
        return self.names

    def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        found = {}
        for k, name in enumerate(sorted(parcels)):
            rng = np.random.default_rng(k)
            length = 1e-3 * self.steps * rng.uniform(0.1, 1.0)
            update = {"w": (length * rng.choice([-1, 1], 500)).astype(np.float32)}
            text: dict[str, Any] = {"cases": 10 * self.steps, "steps": self.steps}
            if name.startswith("hostile"):
                update, text = {"w": np.full(500, 100 * 1e-3 * self.steps, np.float32)}, {**text, **self.lie}
            found[name] = Parcel(text=text, arrays=update if kind == "train" else {})
        return found


def first_round(directory: Path, crowd: Crowd, **sections: Any) -> dict[str, Any]:
    federation = {"rounds": 1, "quorum": 1, "attempts": 1, "local_epochs": 1, **sections.pop("federation", {})}
    tree = {"federation": federation, "train": {"batch_size": 10}, "optim": {"lr": 1e-3}, **sections}
    made = Rounds(
        crowd,
        directory,
        Experiment.model_validate(tree),
        {"w": np.ones(500, np.float32)},
        frozenset(),
        objective=("val/error", "min"),
    )
    sites: dict[str, Any] = made.run(crowd.names).history[0]["sites"]
    return sites


@pytest.mark.parametrize(("honest", "hostile"), [(1, 1), (2, 1), (1, 2), (3, 1), (29, 1), (10, 20)])
def test_a_hundredfold_update_of_the_first_round_is_quarantined_and_no_honest_one(
    tmp_path: Path, honest: int, hostile: int
) -> None:
    """Also where most are hostile, of one mind: then no comparison helps, and the recipe does."""
    sites = first_round(tmp_path, Crowd(honest, hostile))
    states = {name: row["state"] for name, row in sites.items()}
    assert all(state == ("ok" if name.startswith("good") else "quarantined") for name, state in states.items()), sites


@pytest.mark.parametrize("local_steps", [None, 10])
def test_a_site_that_is_alone_in_the_first_round_is_held_against_the_recipe(
    tmp_path: Path, local_steps: int | None
) -> None:
    federation = {"local_steps": local_steps}
    with pytest.raises(FederationError, match="as far as this recipe's optimiser can move"):
        first_round(tmp_path, Crowd(0, 1), federation=federation)
    assert first_round(tmp_path / "good", Crowd(1, 0), federation=federation)["good00"]["state"] == "ok"


def test_a_hundredfold_update_is_not_excused_by_steps_that_nobody_made(tmp_path: Path) -> None:
    sites = first_round(tmp_path, Crowd(2, 1, lie={"steps": 10**9, "cases": 10**9}))
    assert {name: row["state"] for name, row in sites.items()} == {
        "good00": "ok",
        "good01": "ok",
        "hostile00": "quarantined",
    }


def test_who_came_alone_is_held_against_those_that_came_later(tmp_path: Path) -> None:
    """Of the first attempt there is only the hundredfold update: it was accepted before anyone else had answered."""

    class Slow(FakeHub):
        def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
            found = super().ask(kind, parcels, deadline)
            return {"c": found["c"]} if self.asked == 1 else found

    hub = Slow({"c": lambda _, a: Parcel(text=a.text, arrays={"w": np.float32(100) * a.arrays["w"]})})
    made = rounds(tmp_path, hub, rounds=1, attempts=3)
    found = made.run(tuple(GOAL))
    sites = found.history[0]["sites"]
    assert {name: row["state"] for name, row in sites.items()} == {"a": "ok", "b": "ok", "c": "quarantined"}
    assert "times the usual" in sites["c"]["reason"] and np.abs(found.weights["w"]).max() < 5
    assert "doesn't say how far" in made.notes[0]  # type: ignore[attr-defined]
