"""Rounds under secure aggregation, against sites that go at any stage, lie or are killed, and a server that dies."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import FederationError, PrivacyError
from medray.learn.aggregation.mean import Weights
from medray.privacy.credentials import issue_node, new_authority
from medray.privacy.secagg import identity
from medray.privacy.secagg.identity import Signer
from medray.privacy.secagg.site import STAGES
from medray.workflows.federation import secure
from medray.workflows.federation.keeping import RUNS
from medray.workflows.federation.rounds import Federated, Rounds
from medray.workflows.federation.sealing import Sealing

GOAL = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0}
"""Where each site pulls the one weight."""
CASES = {"a": 10, "b": 20, "c": 30, "d": 40}

FREE = {"name": "sgd", "clip_norm": 0.0}
"""A recipe that says nothing of how far an update may reach: these sites go as far as they like."""

Bad = Callable[[Kind, Parcel, Parcel], Parcel | None]
"""Bends one site's answer: kind, question, answer to another."""


class SecureHub:
    """Sites that each go half the way to their goal, and hand it in by the protocol; all that leaves is kept."""

    def __init__(self, folder: Path, bad: Mapping[str, Bad] | None = None, *, scale: float = 1.0) -> None:
        self.folder, self.bad, self.scale = folder, dict(bad or {}), scale
        self.hostile: tuple[str, int, float] | None = None  # a site that hands in so many times its update in a round
        self.notes: list[str] = []
        self.left: list[tuple[str, str, Parcel]] = []
        self.updates: list[dict[str, np.ndarray[Any, Any]]] = []

    def sites(self) -> tuple[str, ...]:
        return tuple(GOAL)

    def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        found = {}
        for name, parcel in parcels.items():
            try:
                answer: Parcel | None = self._site(name, kind, parcel)
            except FederationError as error:
                answer = Parcel(error=str(error))
            if name in self.bad and answer is not None:
                answer = self.bad[name](kind, parcel, answer)
            if answer is not None:
                self.left.append((str(parcel.text.get("ask", kind)), name, answer))
                found[name] = answer
        return found

    def _sealing(self, name: str) -> Sealing:
        return Sealing(self.folder / name, name, note=self.notes.append)  # each time as after a restart

    def _site(self, name: str, kind: Kind, parcel: Parcel) -> Parcel:
        sealing = self._sealing(name)
        experiment = Experiment.model_validate(parcel.text["experiment"])
        if kind == "query":
            return sealing.answer(experiment, parcel)
        w = parcel.arrays["w"]
        text: dict[str, Any] = {"metrics": {"val/error": float(abs(w[0] - 3.0))}, "judged": 4}
        if kind == "train":
            times = self.scale
            if self.hostile is not None and (name, parcel.text["round"]) == self.hostile[:2]:
                times *= self.hostile[2]
            update = {"w": (np.float32(times) * (GOAL[name] - w) / 2).astype(np.float32)}
            if experiment.federation.secure_aggregation:
                text["keys"] = sealing.begin(experiment, parcel, update, CASES[name])
                return Parcel(text=text)
            return Parcel(text=text | {"cases": CASES[name]}, arrays=update)
        return Parcel(text=text)


def start() -> Weights:
    return {"w": np.linspace(-5.0, 9.0, 500, dtype=np.float32)}


def made(directory: Path, hub: SecureHub, **options: Any) -> Rounds:
    federation = {"rounds": 4, "quorum": 3, "attempts": 2, "secure_aggregation": True, **options}
    notes: list[str] = []
    rounds = Rounds(
        hub,
        directory,
        Experiment.model_validate(
            {"seed": federation.pop("seed", 0), "optim": federation.pop("optim", FREE), "federation": federation}
        ),
        start(),
        frozenset(),
        objective=("val/error", "min"),
        latest=True,
        note=notes.append,
    )
    rounds.notes = notes  # type: ignore[attr-defined]
    return rounds


def run(directory: Path, hub: SecureHub, **options: Any) -> Federated:
    return made(directory, hub, **options).run(tuple(GOAL))


def gone(stage: str, only: int | None = None) -> Bad:
    """No answer from a stage on; of one round alone, where it is given."""
    order = ("train", *STAGES)

    def bent(kind: Kind, question: Parcel, answer: Parcel) -> Parcel | None:
        now = str(question.text.get("ask", kind))
        cut = now in order and order.index(now) >= order.index(stage)
        return None if cut and only in (None, question.text["round"]) else answer

    return bent


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_model_is_that_of_the_plain_federation(tmp_path: Path, strategy: str) -> None:
    plain = run(tmp_path / "p", SecureHub(tmp_path / "x"), strategy=strategy, secure_aggregation=False)
    secret = run(tmp_path / "s", SecureHub(tmp_path / "y"), strategy=strategy)
    assert np.abs(plain.weights["w"] - secret.weights["w"]).max() < 1e-6
    assert [entry["summed"] for entry in secret.history] == [4] * 4
    assert all(row["state"] == "ok" and row["cases"] is None for e in secret.history for row in e["sites"].values())


def test_a_hundredfold_update_spoils_a_first_round_and_moves_nothing(tmp_path: Path) -> None:
    """The server, which sees the sum alone, holds that of a first round against what the recipe can reach."""
    hub = SecureHub(tmp_path / "sites", scale=2e-4)  # entries move by up to .0012 in a round: one of Adam's steps
    hub.hostile = ("d", 0, 500.0)
    rounds = made(tmp_path / "run", hub, optim={"lr": 1e-3}, local_steps=1, rounds=3)
    found = rounds.run(tuple(GOAL))
    assert ["discarded" in entry for entry in found.history] == [True, False, False]
    assert "as far as this recipe's optimiser" in found.history[0]["discarded"]
    assert 0 < np.abs(found.weights["w"] - start()["w"]).max() < 3e-3
    assert not any("max_norm is not set" in note for note in rounds.notes)  # type: ignore[attr-defined]


def test_all_that_leaves_a_site_holds_no_update(tmp_path: Path) -> None:
    hub = SecureHub(tmp_path / "sites")
    run(tmp_path / "run", hub, rounds=1)
    by_ask: dict[str, list[Parcel]] = {}
    for ask, _, parcel in hub.left:
        by_ask.setdefault(ask, []).append(parcel)
    assert set(by_ask) == {"train", *STAGES, "evaluate"} and all(len(found) == 4 for found in by_ask.values())
    arrays = {name for found in by_ask.values() for parcel in found for name in parcel.arrays}
    assert arrays == {"masked"} and all(parcel.arrays for parcel in by_ask["masked"])
    assert all(set(parcel.text) == {"metrics", "judged", "keys"} for parcel in by_ask["train"]), "no count, no norm"
    words = np.concatenate([parcel.arrays["masked"] for parcel in by_ask["masked"]]).astype(np.uint64)
    assert words.size == 4 * 501 and 0.45 < (words >= 2**63).mean() < 0.55 and np.unique(words).size == words.size
    assert not list((tmp_path / "sites").rglob("unsent.pt")), "what was summed is forgotten"


@pytest.mark.parametrize("stage", STAGES)
def test_one_that_goes_at_any_stage_costs_no_round(tmp_path: Path, stage: str) -> None:
    found = run(tmp_path / "run", SecureHub(tmp_path / "sites", {"d": gone(stage, only=1)}))
    row = found.history[1]["sites"]["d"]
    in_sum = stage in ("confirm", "unmask")
    assert found.history[1]["summed"] == (4 if in_sum else 3)
    assert row["state"] == ("ok" if in_sum else "late") and (in_sum or f"no answer to {stage}" in row["reason"])
    assert [entry["summed"] for entry in found.history if entry["round"] != 2] == [4] * 3
    assert all("discarded" not in entry for entry in found.history)


@pytest.mark.parametrize("stage", STAGES)
def test_of_too_few_the_round_is_discarded_and_the_next_is_fine(tmp_path: Path, stage: str) -> None:
    hub = SecureHub(tmp_path / "sites", {"c": gone(stage, only=1), "d": gone(stage, only=1)})
    rounds = made(tmp_path / "run", hub, rounds=3)
    found = rounds.run(tuple(GOAL))
    entry = found.history[1]
    assert (
        f"2 of 4 sites answered to {stage}, and it takes 3" in entry["discarded"] and "c: trained" in entry["discarded"]
    )
    assert ["discarded" in other for other in found.history] == [False, True, False]
    said = rounds.notes  # type: ignore[attr-defined]
    assert "max_norm is not set" in said[0] and "round 2: discarded" in said[1]
    # Of 10, 20, 30 and 40 cases the mean goal is 5, and each of the two good rounds goes half the way.
    assert found.weights["w"] == pytest.approx(5 + (start()["w"] - 5) / 4, abs=1e-5)


def test_one_discarded_round_after_the_other_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    bad = {"c": gone("masked"), "d": gone("masked")}
    with pytest.raises(FederationError, match=r"as were the last 2 \(federation\.attempts\).*--resume"):
        run(tmp_path / "run", SecureHub(tmp_path / "sites", bad))
    found = run(tmp_path / "run", SecureHub(tmp_path / "sites"))
    assert [entry.get("summed") for entry in found.history] == [None, None, 4, 4]
    with pytest.raises(FederationError, match="discarded"):
        run(tmp_path / "one", SecureHub(tmp_path / "more", bad), rounds=1)


def test_a_server_that_died_within_a_round_goes_on_with_it(tmp_path: Path) -> None:
    """The sites answer the same questions alike."""

    def dies(kind: Kind, question: Parcel, answer: Parcel) -> Parcel:
        if question.text.get("ask") == "unmask" and question.text["round"] == 1:
            raise KeyboardInterrupt
        return answer

    kept: dict[tuple[str, int], Parcel] = {}

    class Keeps(SecureHub):
        """As real sites: what a round was answered with is kept."""

        def _site(self, name: str, kind: Kind, parcel: Parcel) -> Parcel:
            if kind != "train":
                return super()._site(name, kind, parcel)
            key = (name, int(parcel.text["round"]))
            if key not in kept:
                kept[key] = super()._site(name, kind, parcel)
            return kept[key]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Keeps(tmp_path / "sites", {"b": dies}))
    # "a" has given its shares before, and has forgotten its secrets: it says the same again.
    found = run(tmp_path / "run", Keeps(tmp_path / "sites"))
    whole = run(tmp_path / "whole", SecureHub(tmp_path / "others"))
    assert [entry.get("summed") for entry in found.history] == [4] * 4
    assert np.array_equal(whole.weights["w"], found.weights["w"])


def test_a_sum_that_is_too_long_or_noise_moves_nothing(tmp_path: Path) -> None:
    hub = SecureHub(tmp_path / "sites")
    original = hub._site

    def swells(name: str, kind: Kind, parcel: Parcel) -> Parcel:
        hub.scale = 1000.0 if parcel.text["round"] == 2 and name == "b" else 1.0
        return original(name, kind, parcel)

    hub._site = swells  # type: ignore[method-assign]
    found = run(tmp_path / "run", hub)
    # The site looks at its own update first, and keeps it back.
    row = found.history[2]["sites"]["b"]
    assert row["state"] == "failed" and "keeps its update back" in row["reason"] and found.history[2]["summed"] == 3
    assert not any(letter.isdigit() for letter in row["reason"]), "how long it is stays at the site"

    def lies(kind: Kind, question: Parcel, answer: Parcel) -> Parcel:
        if "masked" not in answer.arrays or question.text["round"] != 2:
            return answer
        words = answer.arrays["masked"].copy()
        words[: words.size - (bent < 2**59)] += np.uint64(bent)
        return Parcel(arrays={"masked": words})

    for bent, reason in ((2**59, "is noise"), (2**50, "times the usual")):
        found = run(tmp_path / f"{bent}", SecureHub(tmp_path / f"of {bent}", {"b": lies}), rounds=3)
        assert [("discarded" in entry) for entry in found.history] == [False, False, True]
        assert reason in found.history[2]["discarded"]


def test_what_is_usual_is_known_also_after_rounds_that_came_to_nothing(tmp_path: Path) -> None:
    rounds = made(tmp_path / "run", SecureHub(tmp_path / "sites"), rounds=1, outlier=20.0)
    rounds.run(tuple(GOAL))
    rounds.config = rounds.config.model_copy(update={"rounds": 7})
    rounds.history += [{**rounds.history[0], "round": n, "discarded": "noise"} for n in range(2, 7)]
    for entry in rounds.history[1:]:
        del entry["norm"]
    rounds.round = 6
    rounds.hub = SecureHub(tmp_path / "others", scale=1e4)  # whose sites have no past of their own
    with pytest.raises(FederationError, match="times the usual"):
        rounds._one(tuple(GOAL))


@pytest.mark.parametrize("fault", ["signature", "expired"])
def test_one_bad_certificate_costs_its_own_site_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The server looks before it tells the others, who would each give the round up."""
    now = dt.datetime.now(dt.UTC)
    authority = new_authority("lungs", now=now)
    nodes = {name: issue_node(authority, name, now=now, days=2 if name == "d" else 9) for name in GOAL}

    def signer(name: str) -> Signer:
        return Signer(name, certificate=nodes[name].certificate, key=nodes[name].key, authority=authority.certificate)

    signers = {name: signer(name) for name in GOAL}

    class Signs(SecureHub):
        def _sealing(self, name: str) -> Sealing:
            return Sealing(self.folder / name, name, lambda: signers[name])

    def falsifies(kind: Kind, question: Parcel, answer: Parcel) -> Parcel:
        if kind != "train" or fault == "expired":
            return answer
        keys = dict(answer.text["keys"])
        return Parcel(text={**answer.text, "keys": {**keys, "mask": "ab" * 32}})

    rounds = made(tmp_path / "run", Signs(tmp_path / "sites", {"d": falsifies}), rounds=1)
    rounds._authority = authority.certificate
    if fault == "expired":
        monkeypatch.setattr(identity, "_now", lambda: now + dt.timedelta(days=3))
    entry = rounds.run(tuple(GOAL)).history[0]
    assert entry["summed"] == 3 and "discarded" not in entry
    wanted = (
        ("quarantined", "signature of site 'd' is false") if fault == "signature" else ("failed", "node.crt: expired")
    )
    assert entry["sites"]["d"]["state"] == wanted[0] and wanted[1] in entry["sites"]["d"]["reason"]


def test_all_stages_have_one_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that each take a stage's whole time would else have a round last for hours."""
    now, waits, hub = [0.0], [], SecureHub(tmp_path / "sites")
    monkeypatch.setattr(secure, "monotonic", lambda: now[0])
    ask = hub.ask

    def slow(kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        if kind == "query":
            waits.append(deadline)
            now[0] += 250
        return ask(kind, parcels, deadline)

    hub.ask = slow  # type: ignore[method-assign]
    with pytest.raises(FederationError, match=r"no time is left for unmask.*federation\.deadline"):
        run(tmp_path / "run", hub, rounds=1, deadline=600)
    assert waits == [300, 350, 100]


def test_a_site_counts_by_no_more_cases_than_agreed_and_says_what_it_cut(tmp_path: Path) -> None:
    hub = SecureHub(tmp_path / "sites", scale=1e6)
    found = run(tmp_path / "run", hub, rounds=1, max_cases=20)
    shares = np.array([10, 20, 20, 20]) / 70
    moved = [np.clip(1e6 * (goal - start()["w"]) / 2, -4096, 4096) for goal in GOAL.values()]
    assert found.weights["w"] == pytest.approx(start()["w"] + shares @ np.array(moved), abs=1e-2)
    assert sum("counts for 20" in note for note in hub.notes) == 2
    assert sum("beyond 4096" in note and "were cut" in note for note in hub.notes) == 4


def test_a_certificate_older_than_one_that_was_shown_before_is_refused(tmp_path: Path) -> None:
    """A key that was stolen, and has been renewed since, speaks for nobody where the new one has been seen."""
    now = dt.datetime.now(dt.UTC)
    authority = new_authority("lungs", now=now - dt.timedelta(days=9))

    def signers(days: int) -> dict[str, Signer]:
        found = {}
        for name in GOAL:
            made_at = now - dt.timedelta(days=days if name == "d" else 5)
            node = issue_node(authority, name, now=made_at, days=30)
            found[name] = Signer(name, certificate=node.certificate, key=node.key, authority=authority.certificate)
        return found

    class Signs(SecureHub):
        by: Mapping[str, Signer]

        def _sealing(self, name: str) -> Sealing:
            return Sealing(self.folder / name, name, lambda: self.by[name])

    hub = Signs(tmp_path / "sites")
    hub.by = old = signers(5)
    assert "discarded" not in run(tmp_path / "one", hub, rounds=1).history[0]
    hub.by = {**old, "d": signers(1)["d"]}
    assert "discarded" not in run(tmp_path / "two", hub, rounds=1, seed=1).history[0]
    hub.by = old
    with pytest.raises(FederationError, match="certificate of site 'd' is older than one that it has shown before"):
        run(tmp_path / "three", hub, rounds=1, seed=2)


def test_a_strangers_answers_count_as_none(tmp_path: Path) -> None:
    def with_text(stage: str, **text: Any) -> Bad:
        def bent(kind: Kind, question: Parcel, answer: Parcel) -> Parcel:
            is_it = question.text.get("ask", kind) == stage
            return Parcel(text={**answer.text, **text}, arrays=answer.arrays) if is_it else answer

        return bent

    cases: list[tuple[Bad, str, str]] = [
        (with_text("train", keys={}), "quarantined", "public keys"),
        (with_text("train", keys={"mask": "zz"}), "quarantined", "bytes by name"),
        (with_text("train", judged=-1), "quarantined", "number of cases"),
        (with_text("shares", envelopes={"a": "00"}), "failed", "not one for each"),
        (with_text("unmask", seeds={"a": "00"}), "ok", ""),
        (lambda k, q, a: Parcel(arrays={"masked": np.zeros(3)}) if a.arrays else a, "failed", "isn't 501 words"),
        (lambda k, q, a: Parcel(text=a.text, arrays={"w": np.ones(2)}) if k == "train" else a, "quarantined", "arrays"),
    ]
    for number, (bad, state, reason) in enumerate(cases):
        found = run(tmp_path / f"run{number}", SecureHub(tmp_path / f"sites{number}", {"d": bad}), rounds=1)
        row = found.history[0]["sites"]["d"]
        assert row["state"] == state and reason in (row["reason"] or "") and "discarded" not in found.history[0]


def test_a_site_answers_for_its_own_run_and_round_alone(tmp_path: Path) -> None:
    experiment = Experiment.model_validate({"federation": {"quorum": 3, "secure_aggregation": True}})
    sealing = Sealing(tmp_path, "a")
    asked = {"experiment": experiment.model_dump(mode="json"), "round": 0, "run": "a" * 32}
    text = {**asked, "ask": "shares", "roster": {}}
    with pytest.raises(FederationError, match="no keys of this run"):
        sealing.answer(experiment, Parcel(text=text))
    sealing.begin(experiment, Parcel(text=asked), {"w": np.ones(3, np.float32)}, 7)
    with pytest.raises(FederationError, match="no keys of round 2 of this run, but of 1"):
        sealing.answer(experiment, Parcel(text=text | {"round": 1}))
    with pytest.raises(FederationError, match="no keys of this run"):
        sealing.answer(experiment, Parcel(text=text | {"run": "b" * 32}))
    for wrong in ({"run": None}, {"run": "../" * 10}, {"round": -1}, {"round": True}):
        with pytest.raises(FederationError, match="names its r"):
            sealing.answer(experiment, Parcel(text=text | wrong))
    with pytest.raises(FederationError, match="its own keys"):
        sealing.answer(experiment, Parcel(text=text))
    with pytest.raises(FederationError, match="NaN or infinite"):
        sealing.begin(experiment, Parcel(text=asked | {"round": 1}), {"w": np.array([np.nan], np.float32)}, 7)
    (secret,) = tmp_path.rglob("secret.pt")
    assert "update" not in json.dumps(secret.read_bytes().decode("latin-1"))


def test_sites_that_were_sent_other_weights_sum_nothing(tmp_path: Path) -> None:
    """A server would make one site's update stand out of the sum by what it lets the others train (Pasquini 2022)."""
    hub = SecureHub(tmp_path / "sites")
    original = hub._site

    def misled(name: str, kind: Kind, parcel: Parcel) -> Parcel:
        other = kind == "train" and name == "b"
        return original(name, kind, replace(parcel, arrays={"w": parcel.arrays["w"] + 100}) if other else parcel)

    hub._site = misled  # type: ignore[method-assign]
    with pytest.raises(FederationError, match="discarded"):
        run(tmp_path / "run", hub, rounds=1)


def test_runs_at_once_do_not_meet_and_the_oldest_are_forgotten(tmp_path: Path) -> None:
    experiments = [Experiment.model_validate({"seed": n, "federation": {"quorum": 3}}) for n in range(RUNS + 2)]
    sealing, update = Sealing(tmp_path, "a"), {"w": np.ones(3, np.float32)}

    def asked(n: int) -> Parcel:
        return Parcel(text={"experiment": experiments[n].model_dump(mode="json"), "round": 0, "run": f"{n:x}" * 32})

    def shares(n: int) -> None:
        sealing.answer(experiments[n], Parcel(text={**asked(n).text, "ask": "shares", "roster": {}}))

    for n in range(2):
        sealing.begin(experiments[n], asked(n), update, 7)
    for n in range(2):
        with pytest.raises(FederationError, match="its own keys"):
            shares(n)
    for n in range(2, RUNS + 2):
        sealing.begin(experiments[n], asked(n), update, 7)
    with pytest.raises(FederationError, match="no keys of this run"):
        shares(0)
    assert len(list((tmp_path / "runs").iterdir())) == RUNS
    with pytest.raises(PrivacyError, match="was answered before"):  # whether its keys were used nobody knows any more
        sealing.permit(experiments[0], asked(0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strategy": "krum", "quorum": 5}, "compares the sites' updates"),
        ({"strategy": "median"}, "compares the sites' updates"),
        ({"strategy": "trimmed_mean"}, "compares the sites' updates"),
        ({"compression": "topk"}, "can't be summed"),
        ({"compression": "int8"}, "can't be summed"),
        ({"quorum": 2}, "3 or more"),
    ],
)
def test_what_a_sum_alone_does_not_allow_is_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Experiment.model_validate({"federation": {"quorum": 3, "secure_aggregation": True, **options}})


@pytest.mark.parametrize("adaptive", [True, False])
def test_noise_at_the_server_is_added_to_the_sum_as_to_the_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adaptive: bool
) -> None:
    """Without the noise itself, clipping at the sites under masks comes to what clipping at the server does."""
    monkeypatch.setattr("medray.privacy.noise.SecureRandom.normal", lambda self, count: np.zeros(count))
    privacy = {"epsilon": 5.0, "delta": 1e-2, "clip_norm": 40.0, "adaptive": adaptive, "rate": 0.5}
    found = [
        run(tmp_path / f"{secure}", SecureHub(tmp_path / f"of {secure}"), privacy=privacy, secure_aggregation=secure)
        for secure in (False, True)
    ]
    assert np.abs(found[0].weights["w"] - found[1].weights["w"]).max() < 1e-5
    clips = [[entry["clip"] for entry in one.history] for one in found]
    assert clips[0] == pytest.approx(clips[1], rel=1e-9) and (len(set(clips[0])) > 1) == adaptive
    for one in found:
        assert all("norm" not in row for entry in one.history for row in entry["sites"].values())
    # At most 40 a round of 500 entries: the mean of updates that were cut to that.
    assert 0 < np.linalg.norm(found[1].weights["w"] - start()["w"]) <= 40 * 4 * 2


def test_a_delta_that_lets_a_whole_site_go_is_refused(tmp_path: Path) -> None:
    privacy = {"epsilon": 5.0, "delta": 0.09}
    many = tuple(f"s{n}" for n in range(12))
    with pytest.raises(PrivacyError, match=r"delta=0\.09 for 12 sites must be below 1/12"):
        made(tmp_path / "run", SecureHub(tmp_path / "sites"), privacy=privacy).run(many)


def test_noised_weights_are_on_the_disk_for_good_before_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power between: the rename itself has to be flushed, or the round is noised a second time."""
    flushed: set[tuple[int, int]] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        flushed.add((found.st_dev, found.st_ino))
        real(handle)

    monkeypatch.setattr("medray.workflows.federation.rounds.os.fsync", fsync)
    hub, folder = SecureHub(tmp_path / "sites"), tmp_path / "run"
    seen = []

    def checks(name: str, kind: Kind, parcel: Parcel) -> Parcel:
        if kind == "train" and parcel.text["round"] == 1:
            places = [(path.stat().st_dev, path.stat().st_ino) for path in (folder, folder / "rounds")]
            seen.append(all(place in flushed for place in places))
            assert json.loads((folder / "federation.json").read_text())["round"] == 1
        return original(name, kind, parcel)

    original, hub._site = hub._site, checks  # type: ignore[method-assign]
    run(folder, hub, rounds=2, privacy={"epsilon": 5.0, "delta": 1e-2})
    assert seen == [True] * 4


def test_noise_at_the_server_goes_on_after_a_restart_and_breaks_no_running_statistics(tmp_path: Path) -> None:
    def stop(number: int, _: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt

    privacy = {"epsilon": 5.0, "delta": 1e-2}
    rounds = made(tmp_path / "run", SecureHub(tmp_path / "sites"), privacy=privacy)
    rounds.tell = stop
    with pytest.raises(KeyboardInterrupt):
        rounds.run(tuple(GOAL))
    again = made(tmp_path / "run", SecureHub(tmp_path / "sites"), privacy=privacy)
    found = again.run(tuple(GOAL))
    assert again.central is not None and again.central.released == 4 and len(found.history) == 4
    assert found.history[1]["clip"] == pytest.approx(rounds.central.clip)  # type: ignore[union-attr]
    experiment = Experiment.model_validate({"federation": {"privacy": privacy}})
    hub = SecureHub(tmp_path / "x")
    with pytest.raises(PrivacyError, match=r"running statistics \(w\).*model\.norm=group"):
        Rounds(hub, tmp_path / "x", experiment, start(), frozenset({"w"}), objective=("val/error", "min"))
