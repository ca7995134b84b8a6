"""The server's rounds: ask the sites, check what they send, aggregate, write down, go on.

Every round is written before the next begins: a server that dies goes on at the round it lost. ``federation.json``
names the newest weights; both appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Hub, Parcel, wire_size
from medray.errors import FederationError, PrivacyError
from medray.learn.aggregation.aggregator import Aggregator
from medray.learn.aggregation.checks import beyond, fault, norm, too_long, unreal, usual_norm
from medray.learn.aggregation.compression import decompress
from medray.learn.aggregation.fixed import flat, shaped
from medray.learn.aggregation.mean import Weights
from medray.learn.aggregation.reach import reach
from medray.learn.aggregation.scaffold import CORRECTION, travelled
from medray.privacy.central import Central
from medray.privacy.secagg.roster import PublicKeys
from medray.workflows.federation.said import FIGURES, counts, mean_metrics, odd, stated
from medray.workflows.federation.sealing import alike, topic_of
from medray.workflows.federation.secure import open_round, read_keys

__all__ = ["Federated", "Rounds"]

State = Literal["ok", "late", "failed", "quarantined"]
RECORD = "federation.json"
REMEMBERED = 5
"""Rounds whose norms say what is usual."""


@dataclass(frozen=True, kw_only=True)
class Federated:
    """What the rounds came to.

    Attributes:
        run: its name, by which sites keep what is theirs.
        weights: shared weights of the best round.
        best_round: rounds that these have seen.
        metrics: of them, mean over the sites by validation cases; empty where no site has any.
        history: one entry a round, as in ``federation.json``.
    """

    run: str
    weights: Weights
    best_round: int
    metrics: dict[str, float]
    history: tuple[dict[str, Any], ...]


@dataclass
class _Round:
    """One round while it goes on; ``arrived`` are the updates in good form, ``updates`` those that count."""

    arrived: dict[str, Weights] = field(default_factory=dict)
    updates: dict[str, Weights] = field(default_factory=dict)
    answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, PublicKeys] = field(default_factory=dict)
    attempts: int = 0

    @property
    def there(self) -> tuple[str, ...]:
        """Sites that trained, and whose answer can be used."""
        return tuple(sorted(self.keys or self.updates))


class Rounds:
    """A federation, on the server.

    Args:
        hub: the way to the sites.
        directory: of the run.
        experiment: the same for all sites.
        weights: shared weights before the first round.
        statistics: names of those that no gradient moves.
        objective: the metric that chooses the best round, and its direction.
        authority: certificate (PEM) to check sites' signatures by under secure aggregation; None in a simulation.
        latest: the last round counts as the best: weights that stay at the sites are those of the last.
        tell: hears of each round: its number from 1, and its entry in the history.
        note: hears of what a person should know.
    """

    def __init__(
        self,
        hub: Hub,
        directory: Path,
        experiment: Experiment,
        weights: Weights,
        statistics: frozenset[str],
        *,
        objective: tuple[str, Literal["max", "min"]],
        authority: bytes | None = None,
        latest: bool = False,
        tell: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.hub, self.directory, self.experiment = hub, directory, experiment
        self.config = experiment.federation
        self.objective, self.tell, self.note, self._latest = objective, tell, note, latest
        self.weights, self._authority = weights, authority
        self.aggregator, self._statistics = Aggregator(self.config, statistics), statistics
        self.central = self._central(statistics)
        self.round = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"round": 0, "value": None, "metrics": {}}
        self.best_weights = weights
        self._document = experiment.model_dump(mode="json")
        self._name = secrets.token_hex(16)

    def _central(self, statistics: frozenset[str]) -> Central | None:
        """The noise that this server adds, if any."""
        if not self.config.privacy.on:
            return None
        moving = sorted(statistics & self.weights.keys())
        if moving:
            raise PrivacyError(
                f"federation.privacy.epsilon: the network keeps running statistics ({moving[0]}), which noise would "
                "break. Set model.norm=group"
            )
        return Central(self.config.privacy, self.config.rounds)

    def run(self, sites: tuple[str, ...]) -> Federated:
        """All rounds that are left, then a last look at the result.

        Args:
            sites: who takes part.

        Raises:
            FederationError: the quorum wasn't reached, however often the missing were asked; the files in the folder
                are damaged or of another experiment.
            PrivacyError: noise at the server was asked for with too great a delta for so few sites.
        """
        if len(sites) < self.config.quorum:
            raise FederationError(
                f"{len(sites)} site(s) ({', '.join(sites)}) can't give the {self.config.quorum} updates that "
                "federation.quorum asks for. Lower it, or add sites"
            )
        if self.central is not None and self.config.privacy.delta >= 1 / len(sites):
            raise PrivacyError(
                f"federation.privacy.delta={self.config.privacy.delta:g} for {len(sites)} sites must be below "
                f"1/{len(sites)}: else giving away one of them whole would be allowed. Lower it"
            )
        self._resume()
        dear = self.config.secure_aggregation or self.experiment.privacy.on
        if dear and not (self.directory / RECORD).exists():
            self._save()  # its name: to another, sites that answered in the first round pay again, or sit it out
        if self.central is None and self.config.max_norm is None and self._farthest(1) is None:
            self.note(
                "federation.max_norm is not set, and this recipe doesn't say how far an honest update of the first "
                "round may reach: it needs optim.name=adamw or adam, or optim.clip_norm without privacy.epsilon; under "
                "privacy.epsilon federation.local_steps, too. What is known is how the sites' updates compare"
            )
        while self.round < self.config.rounds:
            self._one(sites)
        last = self.history[-1].get("last")
        missing = tuple(name for name in sites if last is None or name not in last["sites"])
        if last is None or (self._latest and missing):  # who keeps weights makes a model of its own of this look
            self._last_look(missing)
        return Federated(
            run=self._name,
            weights=self.best_weights,
            best_round=int(self.best["round"]),
            metrics=dict(self.best["metrics"]),
            history=tuple(self.history),
        )

    # -- one round
    # -------------------------------------------------------------------------------------------------------

    def _one(self, sites: tuple[str, ...]) -> None:
        began = time.monotonic()
        asked = self._lot(sites)
        now = _Round()
        while True:
            now.attempts += 1
            self._ask(now, tuple(name for name in asked if name not in now.there))
            if len(now.there) >= min(self.config.quorum, len(asked)):
                break
            missing = self._missing(now, asked)
            if now.attempts >= self.config.attempts:
                raise FederationError(
                    f"round {self.round + 1}: {len(now.there)} of the {self.config.quorum} good updates that "
                    f"federation.quorum asks for, after {now.attempts} attempts. {missing}. The rounds before are "
                    "kept: go on with --resume once the sites are well"
                )
            self.note(f"round {self.round + 1}: waiting for the quorum of {self.config.quorum}. {missing}")
        self._observe({name: answer for name, answer in now.answers.items() if name in now.there})
        before = mean_metrics({name: now.answers[name] for name in now.there})
        more = self._summed(now) if self.config.secure_aggregation else self._stepped(now)
        self.round += 1
        entry = {
            "round": self.round,
            "sites": now.sites,
            "metrics_before": before,
            "attempts": now.attempts,
            "seconds": time.monotonic() - began,
            "down": sum(int(row.get("down", 0)) for row in now.sites.values()),
            "up": sum(int(row.get("up", 0)) for row in now.sites.values()),
            **more,
        }
        self.history.append(entry)
        self._save()  # before these weights leave: noise that was drawn twice for one round would be paid for once
        self.tell(self.round, entry)
        self._still_worth_it()

    def _stepped(self, now: _Round) -> dict[str, Any]:
        """Move the weights by the sites' updates."""
        updates = [now.updates[name] for name in now.there]
        if self.central is not None:
            mean = self.central.mean([flat(update) for update in updates])
            self._step([shaped(mean, self.weights)], [1.0])
            return {"clip": self.central.clip}
        weigh = counts([now.answers[name] for name in now.there], private=self.experiment.privacy.on)
        self._step(updates, weigh, now.there)
        return {}

    def _summed(self, now: _Round) -> dict[str, Any]:
        """Move the weights by the sum of the sites' updates, which is all that is seen; what the entry says of it.

        A sum that can't be had, or that isn't fit, moves nothing: whose fault it is nobody can see.
        """
        opened = open_round(self.hub, self.experiment, self._parcel(), now.keys)
        for name, (state, why) in opened.lost.items():
            now.sites[name] |= {"state": state, "reason": why}
        for way, found in (("down", opened.down), ("up", opened.up)):
            for name, count in found.items():
                now.sites[name][way] = int(now.sites[name].get(way, 0)) + count
        reason, length = opened.reason, 0.0
        if opened.mean is not None and self.central is not None:
            total, inside = opened.mean * opened.sites, opened.inside * opened.sites
            self._step([shaped(self.central.mean_of(total, inside, opened.sites), self.weights)], [1.0])
            return {"clip": self.central.clip}
        if opened.mean is not None:
            length = float(np.linalg.norm(opened.mean))
            before = [float(entry["norm"]) for entry in self.history if "norm" in entry][-REMEMBERED:]
            most = self.config.max_norm
            reason = too_long(length, usual_norm(before), outlier=self.config.outlier, most=most)
            reason = reason or self._unreal(shaped(opened.mean, self.weights))
            if not before and reason is None:
                reason = beyond(norm(self._moved(shaped(opened.mean, self.weights))), self._farthest(opened.weights))
        if opened.mean is None or reason is not None:
            self.note(f"round {self.round + 1}: discarded: {reason}")
            return {"discarded": str(reason)}
        self._step([shaped(opened.mean, self.weights)], [1.0])
        return {"norm": length, "summed": opened.sites}

    def _moved(self, weights: Weights) -> Weights:
        """Those that gradients move."""
        return {name: value for name, value in weights.items() if name not in self._statistics}

    def _farthest(self, cases: int, steps: int | None = None) -> float | None:
        """How far an honest update can reach that was trained from these weights anew; None where nobody can say.

        Args:
            cases: of all that were summed: no single site has trained on more.
            steps: as a site states them; without, it is taken by the cases.
        """
        federation, train = self.config, self.experiment.train
        steps = federation.local_steps or steps
        if steps is None:
            if alike(self.experiment):  # then nobody tells how many cases there are
                return None
            steps = federation.local_epochs * math.ceil(cases * train.samples_per_case / train.batch_size)
        return reach(self.experiment, self._moved(self.weights), steps, number=self.round)

    def _step(self, updates: Sequence[Weights], counts: Sequence[float], sites: Sequence[str] = ()) -> None:
        length = travelled(self.experiment, self.round)
        stepped = self.aggregator(self.weights, updates, counts, sites=sites, travelled=length)
        broken = fault(stepped, self.weights)
        if broken is not None:
            raise FederationError(
                f"round {self.round + 1}: the aggregate is unusable: {broken}. Lower federation.server_lr"
            )
        self.weights = stepped

    def _still_worth_it(self) -> None:
        """Give up where one round after the other is discarded."""
        most = min(self.config.attempts, self.config.rounds)
        last = self.history[-most:]
        if len(last) == most and all("discarded" in entry for entry in last):
            raise FederationError(
                f"round {self.round}: discarded, as were the last {len(last)} (federation.attempts): "
                f"{last[-1]['discarded']}. The weights are those before them: go on with --resume once the sites are "
                "well"
            )

    def _lot(self, sites: tuple[str, ...]) -> tuple[str, ...]:
        """Who is asked this round: all, or a share drawn from the seed and the round."""
        count = max(min(self.config.quorum, len(sites)), round(self.config.fraction * len(sites)))
        if count >= len(sites):
            return sites
        rng = np.random.default_rng((self.experiment.seed, self.round))
        return tuple(sites[k] for k in sorted(rng.choice(len(sites), count, replace=False)))

    def _ask(self, now: _Round, missing: tuple[str, ...]) -> None:
        parcels = {name: self._parcel(name) for name in missing}
        down = wire_size(next(iter(parcels.values()))) if parcels else 0  # alike for all
        topic = topic_of(self.experiment, self._parcel()) if self.config.secure_aggregation else ""
        began = time.monotonic()
        present = set(self.hub.sites())
        answers = self.hub.ask("train", {n: parcels[n] for n in missing if n in present}, self.config.deadline)
        waited = time.monotonic() - began
        for name in missing:
            now.arrived.pop(name, None)
            row: dict[str, Any] = {"down": down + int(now.sites.get(name, {}).get("down", 0)), "up": 0}
            now.sites[name] = row
            answer = answers.get(name)
            if answer is None:
                why = (
                    f"no answer within {min(waited, self.config.deadline):.3g} s"
                    if name in present
                    else "not connected"
                )
                row |= {"state": "late", "reason": why, "down": row["down"] if name in present else 0}
                continue
            row["up"] = answer.size
            if answer.error is not None:
                row |= {"state": "failed", "reason": answer.error}
                continue
            update, reason = (
                self._keys(now, name, topic, answer) if self.config.secure_aggregation else self._open(answer)
            )
            if update is None:
                row |= {"state": "quarantined", "reason": reason}
                continue
            # Under noise at the server no figure of a site is asked for, nor taken.
            now.answers[name] = {} if self.central is not None else answer.text
            row |= {key: now.answers[name].get(key) for key in FIGURES}
            if self.config.secure_aggregation:
                row |= {"state": "ok", "reason": None}
                continue
            if self.central is not None:  # its length is bounded, and said to nobody
                row |= {"state": "ok", "reason": None}
                now.updates[name] = update
                continue
            row["norm"] = norm(update)
            now.arrived[name] = update
        self._measure(now)

    def _open(self, answer: Parcel) -> tuple[Weights | None, str | None]:
        """The update in an answer, or why there is none to be had."""
        try:
            update = decompress(answer.arrays, self.weights, self.config.compression)
            reason = fault(update, self.weights) or odd(answer.text) or self._unreal(update)
        except FederationError as error:
            return None, str(error)
        except Exception as error:  # whatever a stranger's arrays come to, the other sites go on
            return None, f"it can't be read ({type(error).__name__}: {str(error)[:200]})"
        return (update, None) if reason is None else (None, reason)

    def _unreal(self, update: Weights) -> str | None:
        """Why the running statistics can't be those of any data; topk sends parts of them, of which nobody can say."""
        return None if self.config.compression == "topk" else unreal(update, self.weights)

    def _keys(self, now: _Round, name: str, topic: str, answer: Parcel) -> tuple[Weights | None, str | None]:
        """Take a site's public keys, where its update stays masked: nothing, or why they are none."""
        reason = odd(answer.text)
        if reason is None:
            try:
                now.keys[name] = read_keys(answer, name, topic, now.keys, self._authority)
            except FederationError as error:
                reason = str(error)
        return ({}, None) if reason is None else (None, reason)

    def _measure(self, now: _Round) -> None:
        """Accept what isn't too long, by the norms of this round and the last ones.

        All of this round are measured each time: one that came alone is held against those that come later. In a first
        round, of which so far there may be one update alone, the recipe has its say too.
        """
        before = [
            float(row["norm"])
            for entry in self.history[-REMEMBERED:]
            for row in entry["sites"].values()
            if row.get("state") == "ok" and "norm" in row  # under secure aggregation no norm is known
        ]
        usual = usual_norm([*before, *(float(now.sites[name]["norm"]) for name in now.arrived)])
        steps = dict(zip(now.arrived, stated([now.answers[name].get("steps") for name in now.arrived]), strict=True))
        for name, update in now.arrived.items():
            row, stood = now.sites[name], now.updates.pop(name, None) is not None
            reason = too_long(row["norm"], usual, outlier=self.config.outlier, most=self.config.max_norm)
            if reason is None and not before:
                reason = beyond(norm(self._moved(update)), self._farthest(1, steps[name]))
            if reason is None:
                now.updates[name] = update
            elif stood or row.get("state") != "quarantined":
                self.note(f"round {self.round + 1}: the update of {name} is quarantined: {reason}")
            row |= {"state": "ok" if reason is None else "quarantined", "reason": reason}

    def _missing(self, now: _Round, asked: tuple[str, ...]) -> str:
        return "Missing: " + "; ".join(
            f"{name} ({now.sites[name]['state']}: {now.sites[name]['reason']})"
            for name in asked
            if name not in now.there
        )

    def _parcel(self, site: str = "") -> Parcel:
        """A round's question: the same for all sites, but for what SCAFFOLD corrects one by."""
        text: dict[str, Any] = {"experiment": self._document, "run": self._name, "round": self.round}
        if self.central is not None:
            text["clip"] = self.central.clip
        correction = self.aggregator.correction(self.weights, site)
        arrays = {**self.weights, **{f"{CORRECTION}{name}": value for name, value in correction.items()}}
        return Parcel(text=text, arrays=arrays)

    # -- which round is best
    # ---------------------------------------------------------------------------------------------

    def _observe(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """What the sites say of the weights that they began with: those after ``self.round`` rounds."""
        metrics = mean_metrics(answers)
        name, direction = self.objective
        value, best = metrics.get(name), self.best["value"]
        better = value is not None and (best is None or (value > best if direction == "max" else value < best))
        if better or best is None or self._latest:  # without any figure the last weights count
            self.best = {"round": self.round, "value": value, "metrics": metrics}
            self.best_weights = self.weights

    def _last_look(self, sites: tuple[str, ...]) -> None:
        present = set(self.hub.sites())
        parcels = {name: self._parcel(name) for name in sites if name in present}
        found = self.hub.ask("evaluate", parcels, self.config.deadline)
        before = self.history[-1].get("last") or {"sites": {}}
        answers: dict[str, Mapping[str, Any]] = {
            name: {"metrics": metrics, "judged": before.get("judged", {}).get(name)}
            for name, metrics in before["sites"].items()
        }
        answers |= {name: one.text for name, one in found.items() if one.error is None and not odd(one.text)}
        self._observe(answers)
        self.history[-1]["last"] = {
            "metrics": mean_metrics(answers),
            # Under privacy a site's answer holds no figures at all.
            "sites": {name: text.get("metrics") or {} for name, text in sorted(answers.items())},
            "judged": {name: text.get("judged") for name, text in sorted(answers.items())},
        }
        self._save()
        away = [name for name in sites if name not in answers]
        if self._latest and away:
            self.note(
                f"{', '.join(away)} didn't answer to the last weights, from which a site makes the model with weights "
                "of its own. Once they are well, --resume asks them again"
            )

    # -- on the disk
    # -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        folder = self.directory / "rounds"
        folder.mkdir(parents=True, exist_ok=True)
        newest = f"rounds/{self.round:05d}.safetensors"
        tensors = {f"weights/{name}": value for name, value in self.weights.items()}
        tensors |= {f"server/{name}": value for name, value in self.aggregator.state().items()}
        if self.central is not None:
            tensors |= {f"central/{name}": value for name, value in self.central.state().items()}
        tensors |= {f"best/{name}": value for name, value in self.best_weights.items()}
        _write(self.directory / newest, lambda path: save_file(tensors, str(path)))
        document = {
            "version": 1,
            "run": self._name,
            "experiment": self._document,
            "round": self.round,
            "weights": newest,
            "best": self.best,
            "history": self.history,
        }
        text = json.dumps(document, indent=1)
        _write(self.directory / RECORD, lambda path: path.write_text(text, encoding="utf-8"))
        for old in folder.glob("*.safetensors"):
            if old.name != Path(newest).name:
                old.unlink(missing_ok=True)

    def _resume(self) -> None:
        path = self.directory / RECORD
        if not path.is_file():
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(str(self.directory / document["weights"]))
            same = Experiment.model_validate(document["experiment"]) == self.experiment
            self._name = str(document.get("run", self._name))
            self.round, self.best, self.history = int(document["round"]), document["best"], document["history"]
        except Exception as error:
            raise FederationError(
                f"{path}: the rounds written there can't be read ({type(error).__name__}: {error}). Choose another "
                "folder, or delete this one to begin anew"
            ) from error
        if not same:
            raise FederationError(
                f"{path}: these rounds are of another experiment. Choose another folder with --out, or give the same "
                "settings as before"
            )
        parts: dict[str, Weights] = {"weights": {}, "server": {}, "best": {}, "central": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        if fault(parts["weights"], self.weights) is not None:
            raise FederationError(f"{path}: its weights don't fit the experiment's network. Delete the folder")
        self.weights, self.best_weights = parts["weights"], parts["best"]
        self.aggregator.load_state(parts["server"])
        if self.central is not None:
            self.central.load_state(parts["central"])


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """A file that appears whole or not at all, and survives a loss of power."""
    partial = path.with_name(path.name + ".part")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a loss of power brings back the round before, whose noise would be drawn a second time
    finally:
        os.close(folder)
