"""A site's guard: what passes, what is refused, what is charged and what is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray.config.federation_files import SiteConfig
from medray.config.schema import Experiment
from medray.data.manifest import Case, Manifest
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import DataError, FederationError, PolicyError, PrivacyError
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.audit import Audit
from medray.workflows.federation.attending import Guard, _alone, harmonised
from medray.workflows.federation.charging import IDLE_SECONDS, Charges, open_ledger
from medray.workflows.federation.sealing import KeptBackError
from medray.workflows.federation.site import SiteFolder

PLAN = PrivacyPlan(
    noise_multiplier=2.0,
    sample_rate=0.1,
    steps=30,
    units=50,
    epsilon=1.0,
    delta=1e-5,
    accountant="rdp",
    unit="patient",
    clip_norm=1.0,
)


def rules(folder: Path, **changes: Any) -> SiteConfig:
    tree: dict[str, Any] = {"federation": "lungs", "name": "kiel", "server": "localhost:9443", "data": "images"}
    return SiteConfig.model_validate(tree | changes).at(folder)


def manifest(classes: tuple[str, ...] = ("nodule", "normal"), cases: int = 40) -> Manifest:
    rows = [Case(id=f"{n}", images=(f"{n}.png",), label=n % 2, patient=f"p{n}") for n in range(cases)]
    return Manifest(source="s", root="", task="classification", ndim=2, channels=1, classes=classes, cases=tuple(rows))


class Worker:
    """Stands in for the training, which has tests of its own."""

    def __init__(self, charge: Any = None) -> None:
        self.asked: list[str] = []
        self.charge = charge

    def __call__(self, kind: Kind, parcel: Parcel) -> Parcel:
        self.asked.append(kind)
        if parcel.text.get("round") == 13:
            raise ZeroDivisionError("patient 4711")
        if self.charge is not None and kind == "train":
            self.charge(PLAN, 10)
        return Parcel(text={"cases": 40, "metrics": {"val/auc": 0.9}, "loss": 0.1}, arrays={"w": np.ones(3)})


def guard(folder: Path, **changes: Any) -> Guard:
    manifest().save(folder / "work" / "site" / "manifest.json")
    made = Guard(
        rules(folder, **changes),
        manifest(),
        SiteFolder(name="kiel", directory=str(folder / "work" / "site"), cache=str(folder / "cache")),
    )
    made.worker = Worker(charge=made._charge)  # type: ignore[assignment]
    return made


def question(kind_round: int = 0, **experiment: Any) -> Parcel:
    asked = Experiment.model_validate({"data": "-", **experiment}).model_dump(mode="json")
    return Parcel(text={"experiment": asked, "run": "a" * 32, "round": kind_round})


PRIVATE = {
    "privacy": {"epsilon": 1.0, "delta": 1e-5},
    "loss": {"name": "cross_entropy"},
    "train": {"precision": "fp32"},
    "model": {"name": "small_cnn", "norm": "group"},
}


def test_without_privacy_nothing_is_trained_where_it_is_required(tmp_path: Path) -> None:
    site = guard(tmp_path)
    with pytest.raises(PolicyError, match=r"privacy\.required"):
        site("train", question())
    with pytest.raises(PolicyError, match="share_fingerprint"):
        site("query", Parcel(text={"ask": "fingerprint"}))
    assert site.worker.asked == []  # type: ignore[attr-defined]
    events = [(line.event, line.about.get("what")) for line in Audit(tmp_path / "audit.jsonl").read()]
    assert events == [("started", None), ("refused", "train"), ("refused", "fingerprint")]


def test_what_leaves_under_privacy_is_weights_alone(tmp_path: Path) -> None:
    site = guard(tmp_path)
    answer = site("train", question(**PRIVATE))
    assert set(answer.arrays) == {"w"} and not answer.text
    released = Audit(tmp_path / "audit.jsonl").read()[-1]
    assert released.event == "released" and released.about["bytes"] == 24
    assert site.ledger.spent().epsilon > 0


def test_secure_aggregation_may_be_demanded_and_its_keys_leave(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"require_secure_aggregation": True})
    with pytest.raises(PolicyError, match=r"privacy\.require_secure_aggregation is true"):
        site("train", question(**PRIVATE))
    assert site.worker.asked == []  # type: ignore[attr-defined]

    def trains(kind: Kind, parcel: Parcel) -> Parcel:
        return Parcel(text={"keys": {"mask": "00"}, "cases": 40, "loss": 0.1})

    site.worker = trains  # type: ignore[assignment]
    secure = {"secure_aggregation": True, "quorum": 3}
    assert site("train", question(**PRIVATE, federation=secure)).text == {"keys": {"mask": "00"}}


def test_how_long_a_kept_update_is_stays_in_the_sites_log(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"required": False})

    def trains(kind: Kind, parcel: Parcel) -> Parcel:
        raise KeptBackError("it is too long", "its norm 4711 is above")

    site.worker = trains  # type: ignore[assignment]
    with pytest.raises(FederationError, match=r"^it is too long$"):
        site("train", question(federation={"secure_aggregation": True, "quorum": 3}))
    assert "4711" in Audit(tmp_path / "audit.jsonl").read()[-1].about["reason"]


def test_where_the_site_does_not_ask_for_privacy_figures_leave_too(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"required": False})
    assert site("train", question()).text["metrics"] == {"val/auc": 0.9}
    assert site("query", Parcel(text={"ask": "fingerprint"})).text["cases"] == 40


def test_what_would_not_be_private_is_refused(tmp_path: Path) -> None:
    site = guard(tmp_path)
    with pytest.raises(PolicyError, match=r"privacy\.secure=false"):
        site("train", question(**{**PRIVATE, "privacy": {"epsilon": 1.0, "secure": False}}))
    with pytest.raises(PrivacyError, match="mixup"):
        site("train", question(**{**PRIVATE, "train": {"precision": "fp32", "mixup": 0.2}}))
    with pytest.raises(PolicyError, match="no valid experiment"):
        site("train", Parcel(text={"experiment": {"optim": {"lr": "high"}}, "round": 0}))
    noisy = guard(tmp_path / "noisy", privacy={"least_noise": 3.0})
    with pytest.raises(PolicyError, match="least_noise=3"):
        noisy("train", question(**PRIVATE))
    assert noisy.ledger.spent().epsilon == 0


def test_an_unforeseen_error_says_nothing_of_patients(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"required": False})
    with pytest.raises(FederationError, match="ZeroDivisionError") as told:
        site("train", question(13))
    assert "4711" not in str(told.value)
    assert "4711" in str(Audit(tmp_path / "audit.jsonl").read()[-1].about["reason"])


def test_rounds_are_charged_before_they_begin_and_once(tmp_path: Path) -> None:
    ledger = open_ledger(rules(tmp_path))
    charges = Charges(ledger, tmp_path / "work" / "charged.json")
    whole = None
    for _ in range(3):
        charges("a" * 64, PLAN, 10)
        whole = whole or ledger.spent().epsilon
        assert ledger.spent().epsilon == whole, "the run was reserved as a whole"
    Charges(ledger, tmp_path / "work" / "charged.json")("a" * 64, PLAN, 10)  # asked again, after a restart
    assert ledger.spent().epsilon > whole  # type: ignore[operator]
    assert [entry.reservation.history for entry in ledger.entries()] == [((2.0, 0.1, 30),), ((2.0, 0.1, 10),)]


def test_runs_at_once_are_each_reserved_once_and_in_full(tmp_path: Path) -> None:
    ledger = open_ledger(rules(tmp_path))
    for _ in range(3):
        for run in "ab":
            Charges(ledger, tmp_path / "charged.json")(run * 64, PLAN, 10)
    assert [(entry.reservation.run[0], entry.counted) for entry in ledger.entries()] == [
        ("a", ((2.0, 0.1, 30),)),
        ("b", ((2.0, 0.1, 30),)),
    ]


def test_what_a_silent_run_left_undone_is_given_back_and_reserved_anew_if_it_returns(tmp_path: Path) -> None:
    ledger, now = open_ledger(rules(tmp_path)), [0.0]
    charges = Charges(ledger, tmp_path / "charged.json", clock=lambda: now[0])
    charges("a" * 64, PLAN, 10)
    now[0] = IDLE_SECONDS - 1
    charges("b" * 64, PLAN, 0)
    assert charges.running("a" * 64) and charges.running("b" * 64)
    now[0] = IDLE_SECONDS + 1
    charges("c" * 64, PLAN, 10)
    assert not charges.running("a" * 64) and charges.running("b" * 64)
    assert [entry.counted for entry in ledger.entries()] == [((2.0, 0.1, n),) for n in (10, 30, 30)]
    for _ in range(2):
        charges("a" * 64, PLAN, 10)
    charges("a" * 64, PLAN, 0)
    mine = [entry.counted for entry in ledger.entries() if entry.reservation.run[0] == "a"]
    assert mine == [((2.0, 0.1, 10),), ((2.0, 0.1, 20),)], "together what the plan has, and no more"
    charges("a" * 64, PLAN, 10)  # a round again
    assert ledger.entries()[-1].counted == ((2.0, 0.1, 10),) and len(ledger.entries()) == 5
    now[0] = -1e9  # a clock that was set back gives back what was not begun, never what was
    charges("d" * 64, PLAN, 10)
    assert [entry.counted[0][2] for entry in ledger.entries()] == [10, 0, 10, 20, 10, 30]


def test_the_ledger_has_the_last_word(tmp_path: Path) -> None:
    tight = rules(tmp_path, privacy={"epsilon_per_run": 0.1, "epsilon_per_year": 0.1})
    with pytest.raises(PrivacyError, match="a run"):
        Charges(open_ledger(tight), tmp_path / "charged.json")("a" * 64, PLAN, 10)
    assert not (tmp_path / "charged.json").exists()
    wider = open_ledger(rules(tmp_path, privacy={"epsilon_per_run": 3.0}))
    assert wider.limits.per_run == 3.0
    with pytest.raises(PrivacyError, match="was begun at delta"):
        open_ledger(rules(tmp_path, privacy={"delta": 1e-6}))


def test_classes_are_brought_to_the_federations_words(tmp_path: Path) -> None:
    found = harmonised(
        manifest(("krebs", "normal")), rules(tmp_path, classes=["normal", "nodule"], labels={"krebs": "nodule"})
    )
    assert found.classes == ("normal", "nodule")
    assert [case.label for case in found.cases[:2]] == [1, 0]
    with pytest.raises(FederationError, match=r"labels: \{normal: clear\}"):
        harmonised(manifest(), rules(tmp_path, classes=["clear", "nodule"]))
    with pytest.raises(FederationError, match="is no class of these data"):
        harmonised(manifest(), rules(tmp_path, labels={"tumour": "nodule"}))
    masks = manifest().model_copy(update={"task": "segmentation"})
    with pytest.raises(FederationError, match="another order"):
        harmonised(masks, rules(tmp_path, classes=["normal", "nodule"]))


def test_a_settled_reservation_covers_no_further_steps(tmp_path: Path) -> None:
    """Run b closes run a and dies before it is written down: a's next round is charged anew, not ridden for free."""
    ledger, now = open_ledger(rules(tmp_path)), [0.0]
    charges = Charges(ledger, tmp_path / "charged.json", clock=lambda: now[0])
    charges("a" * 64, PLAN, 10)
    before = (tmp_path / "charged.json").read_text()
    now[0] = 2 * IDLE_SECONDS
    charges("b" * 64, PLAN, 10)
    (tmp_path / "charged.json").write_text(before)
    charges("a" * 64, PLAN, 10)
    assert [entry.reservation.run[0] for entry in ledger.entries()] == ["a", "b", "a"]


def test_another_plan_under_the_same_recipe_is_reserved_anew(tmp_path: Path) -> None:
    ledger = open_ledger(rules(tmp_path))
    charges = Charges(ledger, tmp_path / "charged.json")
    charges("a" * 64, PLAN, 30)
    charges("a" * 64, replace(PLAN, sample_rate=0.05, steps=60), 20)  # the site came back with twice the cases
    assert [entry.counted for entry in ledger.entries()] == [((2.0, 0.1, 30),), ((2.0, 0.05, 60),)]


def test_errors_that_may_name_a_case_stay_at_home(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"required": False})

    def fails(kind: Kind, parcel: Parcel) -> Parcel:
        raise DataError("/data/Mueller_1954/ct.nii.gz: would become 10^12 voxels")

    site.worker = fails  # type: ignore[assignment]
    with pytest.raises(FederationError) as told:
        site("train", question())
    assert "Mueller" not in str(told.value) and "DataError" in str(told.value)
    assert "Mueller" in str(Audit(tmp_path / "audit.jsonl").read()[-1].about["reason"])


def test_what_would_reach_beyond_the_rules_is_refused(tmp_path: Path) -> None:
    site = guard(tmp_path, privacy={"required": False})
    with pytest.raises(PolicyError, match="names a file here"):
        site("train", question(model={"pretrained": "/srv/other/weights.safetensors"}))
    with pytest.raises(PolicyError, match=r"allow\.local_steps=10000"):
        site("train", question(federation={"local_steps": 10**6}))
    with pytest.raises(PolicyError, match=r"allow\.local_epochs=10"):
        site("train", question(train={"samples_per_case": 1000}))
    site("train", question(federation={"local_steps": 5}))
    picky = guard(tmp_path / "picky", privacy={"required": False}, allow={"models": ["unet"]})
    with pytest.raises(PolicyError, match=r"none of allow\.models") as refused:
        picky("train", question(model={"name": "x" * 10**6}))
    assert len(str(refused.value)) < 3000
    small = guard(tmp_path / "small", privacy={"required": False}, fewest=100)
    with pytest.raises(PolicyError, match="fewest=100"):
        small("query", Parcel(text={"ask": "fingerprint"}))
    assert all(len(str(line.about)) < 5000 for line in Audit(tmp_path / "picky" / "audit.jsonl").read())


def test_no_refusal_tells_how_many_cases_there_are(tmp_path: Path) -> None:
    """Rounds are refused whatever the data; beside that no reason may come and go with the number of cases."""
    said = set()
    for cases in (40, 4000):
        folder = tmp_path / str(cases)
        manifest(cases=cases).save(folder / "work" / "site" / "manifest.json")
        place = SiteFolder(name="kiel", directory=str(folder / "work" / "site"), cache=str(folder / "cache"))
        site = Guard(rules(folder, privacy={"required": False}), manifest(cases=cases), place)
        with pytest.raises(PolicyError) as refused:
            site("train", question(federation={"rounds": 100_000, "local_steps": 600}))
        said.add(str(refused.value))
    assert len(said) == 1 and "rounds" in said.pop()


def test_a_year_that_is_used_up_refuses_training_and_no_last_look(tmp_path: Path) -> None:
    """What exactly was spent stands in the site's own log alone."""
    site = guard(tmp_path)
    other = {**PRIVATE, "privacy": {"epsilon": 3.0, "delta": 1e-5}}
    site._charges("b" * 64 + "/other", PLAN, 30)
    spent = site.ledger.spent(this_year=True).epsilon
    tight = guard(tmp_path, privacy={"epsilon_per_run": 3.0, "epsilon_per_year": 3.0})
    with pytest.raises(PolicyError, match="on top of what was spent") as refused:
        tight("train", question(**other))
    assert f"{spent:.3g}" not in str(refused.value)
    assert f"{spent:.3g} spent" in str(Audit(tmp_path / "audit.jsonl").read()[-1].about["reason"])
    tight("evaluate", question(**other))


def test_one_process_is_a_site(tmp_path: Path) -> None:
    with _alone(tmp_path / "work"), pytest.raises(FederationError, match="another process"), _alone(tmp_path / "work"):
        pass
