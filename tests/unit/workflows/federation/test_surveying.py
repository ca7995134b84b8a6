"""One plan out of sums: what the server receives, what it costs the sites, and what they refuse."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medray.config.federation_files import SiteConfig
from medray.data.checks import check
from medray.data.fingerprint import Fingerprint, measure
from medray.data.fingerprint_sums import Layout, Schema, sums_of
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Hub, Kind, Parcel
from medray.errors import DataError, FederationError
from medray.privacy.credentials import issue_node, new_authority
from medray.workflows.federation import leading
from medray.workflows.federation import surveying as surveys
from medray.workflows.federation.attending import Guard
from medray.workflows.federation.leading import _lead
from medray.workflows.federation.site import SiteFolder
from medray.workflows.federation.surveying import SCALE, Surveyed, survey, surveying

SITES = ("bonn", "jena", "kiel")
SECURE = {"secure_aggregation": True, "quorum": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Of each site its own part; ``all`` of them together."""
    lines = {name: ["patient,age,marker,label"] for name in (*SITES, "all")}
    for number, name in enumerate(SITES):
        rng = np.random.default_rng(number)
        for row in range(60 + 20 * number):
            age, marker = rng.normal(50 + 5 * number, 10), rng.normal()
            line = f"{name}{row},{age:.3f},{marker:.3f},{int(age + 20 * marker > 55)}"
            lines[name].append(line)
            lines["all"].append(line)
    found = {}
    for name, rows in lines.items():
        path = tmp_path_factory.mktemp(name) / "cases.csv"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        found[name] = check(build_manifest(f"{path}?columns=age,marker"))
    return found


class Network:
    """Guarded sites in this process; keeps all that leaves them, with the question."""

    def __init__(
        self, data: dict[str, Manifest], folder: Path, *, names: tuple[str, ...] = SITES, **rules: Any
    ) -> None:
        now = dt.datetime.now(dt.UTC)
        self.authority = new_authority("f", now=now)
        self.left: list[tuple[str, Parcel]] = []
        self.folder, self.away, self.runs = folder, set[tuple[str, str]](), 0
        self.guards: list[Guard] = []
        self.names = names
        for name in names:
            tree: dict[str, Any] = {"federation": "f", "name": name, "server": "localhost:1", "data": "-", **rules}
            own = SiteConfig.model_validate(tree).at(folder / name)
            data[name].save(own.work / "site" / "manifest.json")
            node = issue_node(self.authority, name, now=now, days=9)
            own.ca.write_bytes(self.authority.certificate)
            own.certificate.write_bytes(node.certificate)
            own.key.write_bytes(node.key)
            place = SiteFolder(name=name, directory=str(own.work / "site"), cache=str(own.work / "cache"))
            self.guards.append(Guard(own, data[name], place))

    def hub(self) -> Hub:
        def opened(number: int) -> Callable[[Kind, Parcel], Parcel]:
            def answer(kind: Kind, parcel: Parcel) -> Parcel:
                if (self.names[number], str(parcel.text.get("ask", kind))) in self.away:
                    raise FederationError("gone")
                found = self.guards[number](kind, parcel)
                self.left.append((str(parcel.text.get("ask", kind)), found))
                return found

            return answer

        return in_process(opened, len(self.names))

    def survey(
        self, delta: float = 1e-5, seed: int = 0, *, run: Path | None = None, sites: Any = SITES, **federation: Any
    ) -> Surveyed:
        """In a run's folder of its own, or that of a former one."""
        self.runs += 1
        self.said: list[str] = []
        config = leading._federation({"federation": {"quorum": 2, **federation}})
        experiment = surveying(config, delta=delta, seed=seed)
        authority = self.authority.certificate
        run = run or self.folder / f"run-{self.runs}"
        return survey(self.hub(), sites, experiment, run, authority=authority, said=self.said.append)


def near(found: Fingerprint, exact: Fingerprint) -> None:
    assert (found.cases, found.patients, found.class_cases) == (exact.cases, exact.patients, exact.class_cases)
    assert found.shape_median == exact.shape_median and found.columns == exact.columns
    for mine, its in zip(found.intensity, exact.intensity, strict=True):
        assert mine.mean == pytest.approx(its.mean, abs=0.05 * its.std)
        assert mine.std == pytest.approx(its.std, rel=0.05)
        assert mine.p005 == pytest.approx(its.p005, abs=0.3 * its.std)


def test_by_secure_aggregation_the_server_has_the_sum_and_no_sites_own(
    data: dict[str, Manifest], tmp_path: Path
) -> None:
    network = Network(data, tmp_path, privacy={"required": False, "require_secure_aggregation": True})
    found = network.survey(**SECURE)
    assert found.sites == 3 and "exact sums" in found.said and "the sum alone was seen" in found.said
    near(found.fingerprint, measure(data["all"]))
    arrays = {(ask, name) for ask, parcel in network.left for name in parcel.arrays}
    assert arrays == {("masked", "masked")}
    own = {name: sums_of(data[name], Layout(Schema.of(data[name]), coarse=False)) for name in SITES}
    words = [parcel.arrays["masked"] for ask, parcel in network.left if ask == "masked"]
    for row in words:
        assert row.dtype == np.uint64 and 0.45 < (row >= 2**63).mean() < 0.55 and np.unique(row).size == row.size
    told = [set(parcel.text) for ask, parcel in network.left if ask == "sums"]
    assert told == [{"std", "keys"}] * 3 and all(row.sum() > 0 for row in own.values())
    # Of one kind of survey a site answers one: the difference of two could be one site's.
    with pytest.raises(FederationError, match=r"another seed.*--fingerprint"):
        network.survey(**SECURE)
    assert network.survey(seed=1, **SECURE).fingerprint.cases == found.fingerprint.cases
    with pytest.raises(FederationError, match=r"require_secure_aggregation is true"):
        network.survey()


def test_where_privacy_is_demanded_sums_leave_with_noise_that_is_charged(
    data: dict[str, Manifest], tmp_path: Path
) -> None:
    network = Network(data, tmp_path, privacy={"epsilon_per_run": 3.0, "epsilon_per_year": 4.0})
    with pytest.raises(FederationError, match=r"privacy\.epsilon is unset.*fingerprint_epsilon"):
        network.survey()
    assert not any("sums" in parcel.arrays for _, parcel in network.left)
    for federation in (
        {},
        SECURE,
    ):  # of 240 patients this noise leaves nothing; how much there was is charged all the same
        with pytest.raises(FederationError, match="exceeds the noise"):
            network.survey(fingerprint_epsilon=1.0, **federation)
    for guard in network.guards:
        assert [round(entry.counted[0][0], 6) for entry in guard.ledger.entries()] == [
            round(guard.ledger.entries()[0].counted[0][0], 6)
        ] * 2
        assert 1.0 < guard.ledger.spent().epsilon < 2.0
    shown = [parcel for ask, parcel in network.left if ask == "sums" and parcel.arrays]
    layout = Layout(Schema.of(data["bonn"]), coarse=True)
    for name, parcel in zip(SITES, shown, strict=True):
        noise = parcel.arrays["sums"] * SCALE - sums_of(data[name], layout)
        assert noise.std() == pytest.approx(parcel.text["std"], rel=0.2) and parcel.text["std"] > 3
    with pytest.raises(FederationError, match=r"epsilon_per_run=3"):
        network.survey(fingerprint_epsilon=3.5)
    with pytest.raises(FederationError, match=r"delta 0\.001 is more"):
        network.survey(fingerprint_epsilon=1.0, delta=1e-3)
    with pytest.raises(FederationError, match=r"epsilon_per_year=4"):
        network.survey(fingerprint_epsilon=2.9)
    assert all(len(guard.ledger.entries()) == 2 for guard in network.guards)


def test_the_same_question_has_the_same_answer_and_is_paid_for_once(data: dict[str, Manifest], tmp_path: Path) -> None:
    network = Network(data, tmp_path)
    schema = Schema.of(data["bonn"])
    experiment = surveying(leading._federation({"federation": {"fingerprint_epsilon": 1.0}}), delta=1e-5)
    document = experiment.model_dump(mode="json")
    text = {"ask": "sums", "experiment": document, "run": "a" * 32, "round": 0, "schema": schema.model_dump()}
    guard = network.guards[0]
    first, again = (guard("query", Parcel(text=text)).arrays["sums"] for _ in range(2))
    assert np.array_equal(first, again) and len(guard.ledger.entries()) == 1
    other = guard("query", Parcel(text={**text, "run": "b" * 32})).arrays["sums"]
    assert not np.array_equal(first, other) and len(guard.ledger.entries()) == 2
    # What lets sums pass lets no training pass.
    plain = {**text, "experiment": surveying(leading._federation({}), delta=1e-5).model_dump(mode="json")}
    with pytest.raises(Exception, match=r"privacy\.required is true"):
        guard("train", Parcel(text=plain))
    with pytest.raises(FederationError, match="another task"):
        guard("query", Parcel(text={**text, "schema": {**schema.model_dump(), "channels": 5}}))


@pytest.mark.parametrize("secure", [{}, SECURE])
def test_a_survey_that_broke_off_goes_on_and_is_paid_for_once(
    data: dict[str, Manifest], tmp_path: Path, secure: dict[str, Any]
) -> None:
    """Whatever it lacked; a third site that was away comes into the same survey."""
    network, run = Network(data, tmp_path), tmp_path / "run"
    network.away = {("kiel", "sums")}
    how = {"fingerprint_epsilon": 1.0, **secure, "quorum": 3}
    for _ in range(2):
        with pytest.raises(FederationError, match="2 of 3 sites"):
            network.survey(run=run, **how)
    network.away = set()
    for _ in range(2):  # so few patients' sums are lost in the noise, which is found out once all have told
        with pytest.raises(FederationError, match="exceeds the noise"):
            network.survey(run=run, **how)
    assert [len(guard.ledger.entries()) for guard in network.guards] == [1, 1, 1]


def test_exact_sums_that_were_opened_can_be_had_again_after_a_crash(data: dict[str, Manifest], tmp_path: Path) -> None:
    network, run = Network(data, tmp_path, privacy={"required": False}), tmp_path / "run"
    first, again = (network.survey(run=run, **SECURE).fingerprint for _ in range(2))
    assert first == again


def test_a_file_that_can_not_be_read_costs_nothing(
    data: dict[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(data, tmp_path)

    def broken(*_: Any) -> None:
        raise DataError("case 7")

    monkeypatch.setattr(surveys, "sums_of", broken)
    with pytest.raises(FederationError, match="DataError while it worked"):
        network.survey(fingerprint_epsilon=1.0)
    assert not any(guard.ledger.entries() for guard in network.guards)


def test_exact_sums_are_told_among_one_group_of_sites(data: dict[str, Manifest], tmp_path: Path) -> None:
    """Of two groups' sums the difference could be one site's, by whatever round, run or seed they are asked for."""
    four = (*SITES, "ulm")
    network = Network({**data, "ulm": data["bonn"]}, tmp_path, names=four, privacy={"required": False})
    assert network.survey(sites=four, **SECURE).sites == 4
    for seed in (1, 2):
        with pytest.raises(FederationError, match="exact sums of these data among bonn, jena, kiel, ulm"):
            network.survey(seed=seed, **SECURE)
    assert network.survey(seed=3, sites=four, **SECURE).sites == 4, "the same once more says nothing new"
    experiment = surveying(leading._federation({"federation": SECURE}), delta=1e-5)
    schema = Schema.of(data["bonn"]).model_dump(mode="json")
    document = experiment.model_dump(mode="json")
    text = {"ask": "sums", "experiment": document, "run": "a" * 32, "round": 1, "schema": schema}
    with pytest.raises(FederationError, match="a survey has one round"):
        network.guards[0]("query", Parcel(text=text))


def test_sites_whose_files_tell_another_modality_are_surveyed_together(
    data: dict[str, Manifest], tmp_path: Path
) -> None:
    other = "MR" if data["jena"].modality != "MR" else "CT"
    mixed = {**data, "jena": data["jena"].model_copy(update={"modality": other})}
    network = Network(mixed, tmp_path, privacy={"required": False})
    assert network.survey(**SECURE).sites == 3


def test_too_few_patients_tell_nothing(data: dict[str, Manifest], tmp_path: Path) -> None:
    network = Network(data, tmp_path, privacy={"required": False}, fewest=70)
    found = network.survey()  # bonn has 60
    assert found.sites == 2 and found.fingerprint.patients == 180 and any("bonn" in line for line in network.said)
    with pytest.raises(FederationError, match=r"2 of 3 sites.*--fingerprint"):
        network.survey(**SECURE)


def test_a_run_plans_from_the_sum_and_says_so(
    data: dict[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "POLL_SECONDS", 0.0)
    network, run = Network(data, tmp_path, privacy={"required": False}), tmp_path / "run"
    run.mkdir()
    explicit = {"device": "cpu", "model": {"name": "linear"}, "federation": {**SECURE, "rounds": 1}}
    (run / "asked.yaml").write_text(yaml.safe_dump(explicit), encoding="utf-8")
    (tmp_path / "ca.crt").write_bytes(network.authority.certificate)
    network.away = {("kiel", "sums")}
    with pytest.raises(FederationError, match="2 of 3 sites"):
        _lead(network.hub(), run, time.monotonic(), tmp_path / "ca.crt")
    network.away = set()  # and goes on, with what the two others have answered to
    _lead(network.hub(), run, time.monotonic(), tmp_path / "ca.crt")
    near(Fingerprint.load(run / "fingerprint.json"), measure(data["all"]))
    assert "made from exact sums over 3 sites" in (run / "report.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )
    assert {ask for ask, _ in network.left} >= {"schema", "sums", "train", "masked"}
    assert "fingerprint" not in {ask for ask, _ in network.left}
