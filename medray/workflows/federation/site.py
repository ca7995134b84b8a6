"""What a site does when the server asks: say who it is, measure its data, train, judge.

A site's own things lie in its folder and never leave it: ``manifest.json`` and, of each run, the state of its
optimiser, the weights that are its own, what compression left out; see ``keeping``. The state of the last two rounds is
kept, with the answer that was given: a server that lost it gets the same one again. Under differential privacy a second
one would be paid for a second time; under secure aggregation there is none, see ``sealing``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import nn

from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.fingerprint import measure
from medray.data.fingerprint_sums import Schema
from medray.data.loader import TrainLoader, train_loader
from medray.data.manifest import Manifest
from medray.data.splits import Splits, make_splits
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import FederationError, PrivacyError, WithheldError
from medray.learn.aggregation.compression import compress
from medray.learn.aggregation.mean import Weights
from medray.learn.aggregation.reach import reach
from medray.learn.aggregation.scaffold import parted
from medray.privacy.accountant import PrivacyPlan, plan_privacy
from medray.privacy.policy import recipe_digest
from medray.privacy.secagg.identity import Signer
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.leg import Leg, Rounds
from medray.train.precision import resolve_device
from medray.train.runtime import LocalRuntime
from medray.workflows.federation.charging import Charge
from medray.workflows.federation.keeping import keep_state, kept_state, kept_states, place_of, run_folder
from medray.workflows.federation.personal import settled, write_own
from medray.workflows.federation.runtimes import PrivateSiteRuntime, SiteRuntime
from medray.workflows.federation.sealing import STAGES, FirstRound, KeptBackError, Sealing, question_of
from medray.workflows.federation.shared import arrays_of, keeps_own, put, shared_names, statistics_of
from medray.workflows.federation.surveying import SCHEMA, SUMS, answer_sums
from medray.workflows.judging import Validate, make_validate
from medray.workflows.training import new_model

__all__ = ["SiteFolder", "SiteWorker", "local_experiment", "opener"]

NEVER = "a run is over that this site trained in no round of: it has no weights of its own, and no model"
_NOTHING = ("val/none", "max")


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """Where a site's things lie. Small and picklable; :meth:`open` is done once in a process.

    Attributes:
        name: of the site.
        directory: with its ``manifest.json``.
        cache: of prepared cases.
    """

    name: str
    directory: str
    cache: str

    def open(self) -> SiteWorker:
        """The worker of this folder in this process."""
        if self not in _OPEN:
            _OPEN[self] = SiteWorker(self)
        return _OPEN[self]


_OPEN: dict[SiteFolder, SiteWorker] = {}


def local_experiment(experiment: Experiment) -> Experiment:
    """What a site trains in one round: rounds and the federation decide the length, the server averages the weights."""
    length: dict[str, Any] = {"epochs": 1, "budget": None, "patience": None, "validate_every": None}
    alone: dict[str, Any] = {"ema": 0.0, "workers": 1, "min_workers": None}
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={**length, **alone})})


@dataclass(kw_only=True)
class _Bench:
    """What a site needs for one experiment, built once.

    Attributes:
        experiment: as it is trained here.
        steps: of one round.
        plan: of the whole run's privacy, where it has any.
    """

    experiment: Experiment
    model: nn.Module
    fresh: dict[str, torch.Tensor]
    loader: TrainLoader
    loss: nn.Module
    validate: Validate | None
    shared: tuple[str, ...]
    splits: Splits
    steps: int
    plan: PrivacyPlan | None


class SiteWorker:
    """Answers the server; see :data:`medray.engines.flower.parcel.Answer`.

    Args:
        folder: of the site.
        charge: called before each round of private training; None in a simulation, whose sites have no ledger.
        fewest: patients that must train, or nothing is trained; and validate, or nothing is judged.
        signer: gives this site's node key, for secure aggregation; None in a simulation.
        note: hears what the site's owner should know, and nobody else.
        models: folder for bundles of the site's own models, where weights stay at the sites; None in a simulation,
            which writes them itself.
    """

    def __init__(
        self,
        folder: SiteFolder,
        *,
        charge: Charge | None = None,
        fewest: int = 1,
        signer: Callable[[], Signer] | None = None,
        note: Callable[[str], None] = lambda _: None,
        models: Path | None = None,
    ) -> None:
        self.folder, self._charge, self._fewest, self._models = folder, charge, fewest, models
        self.directory = Path(folder.directory)
        self.manifest = Manifest.load(self.directory / "manifest.json")
        self._note, self._sealing = note, Sealing(self.directory, folder.name, signer, note=note)
        self._bench: _Bench | None = None

    def __call__(self, kind: Kind, parcel: Parcel) -> Parcel:
        """Do what is asked.

        Raises:
            FederationError: a question that no site knows, or weights that don't fit.
                WithheldError: too few patients would train, or too few for the privacy that is asked for.
            PrivacyError: the run, or this round of it, may not be paid for.
            MedrayError: whatever the work itself comes to.
        """
        if kind == "query" and parcel.text.get("ask") == "hello":
            return Parcel(text={"name": self.folder.name})
        if kind == "query" and parcel.text.get("ask") == "fingerprint":
            return Parcel(text={"fingerprint": measure(self.manifest).model_dump(mode="json")})
        if kind == "query" and parcel.text.get("ask") == SCHEMA:
            return Parcel(text={"schema": Schema.of(self.manifest).model_dump(mode="json")})
        if kind == "query" and parcel.text.get("ask") == SUMS:
            asked = self._asked(parcel)
            return answer_sums(self.manifest, self.directory, asked, parcel, self._sealing, self._charge)
        if kind == "query" and parcel.text.get("ask") in STAGES:
            return self._sealing.answer(self._asked(parcel), parcel)
        if kind == "train":
            return self._train(parcel)
        if kind == "evaluate":
            return Parcel(text=self._evaluate(self._asked(parcel), parcel))
        raise FederationError(f"site {self.folder.name}: {kind} {dict(parcel.text)} is nothing that a site answers")

    # -- work
    # ------------------------------------------------------------------------------------------------------------

    def _train(self, parcel: Parcel) -> Parcel:
        began = time.monotonic()
        experiment = self._asked(parcel)
        federation = experiment.federation
        (_, number), question = place_of(parcel), question_of(parcel)
        kept = self._kept(experiment, parcel)
        given = self._given(experiment, kept, number, question)
        if given is not None:
            return given
        if federation.secure_aggregation:
            self._sealing.permit(experiment, parcel)
            self._sealing.ready()
        bench = self._set_up(experiment)
        state = kept_state(kept, before=number)
        self._load(bench, parcel, state)
        judged = self._judge(bench)
        weights, correction = parted(cast(dict[str, Any], dict(parcel.arrays)))
        leg = Leg(number, federation.rounds)
        batches = Rounds(bench.loader, leg, steps=bench.steps, epochs=federation.local_epochs)
        runtime = self._runtime(bench, number, state.get("optimizer"), _tensors(correction))
        result = fit(
            bench.experiment,
            bench.model,
            batches,
            bench.loss,
            validate=lambda _: {"val/none": math.nan},
            objective=_NOTHING,  # type: ignore[arg-type]
            runtime=runtime,
            leg=leg,
        )
        after = arrays_of(bench.model, bench.shared)
        update = {name: value - weights[name] for name, value in after.items()}
        residual = {name: value.numpy() for name, value in state.get("residual", {}).items()}
        sent, left = compress(update, residual, federation.compression, federation.top)
        cases = len(bench.splits.train)
        said: dict[str, Any] = {}
        if federation.secure_aggregation:  # the update stays here, and its weight is masked with it
            try:
                guard = self._first(bench, weights, number)
                sent, said = {}, {"keys": self._sealing.begin(experiment, parcel, update, cases, guard=guard)}
            except KeptBackError as error:
                self._refuse(kept, number, state, question, error)
                raise
        elif not _discreet(experiment):  # steps, and how long they took, tell of the number of cases
            said = {"cases": cases, "steps": result.steps, "seconds": time.monotonic() - began}
        losses = [row["loss"] for row in result.history if math.isfinite(row.get("loss", math.nan))]
        if losses and not _discreet(experiment):
            said["loss"] = losses[-1]
        answer = Parcel(text={**judged, **said}, arrays=sent)
        self._keep(bench, kept, number, runtime, left, question, answer)
        return answer

    def _evaluate(self, experiment: Experiment, parcel: Parcel) -> dict[str, Any]:
        """What the weights are worth here; those of the last round become, with this site's own, its own model."""
        own = self._models is not None and place_of(parcel)[1] >= experiment.federation.rounds
        own = own and keeps_own(experiment.federation)
        if _discreet(experiment) and not own:
            return {"metrics": {}, "judged": 0}
        state = kept_state(self._kept(experiment, parcel))
        if _discreet(experiment) and not state:
            self._note(NEVER)
            return {"metrics": {}, "judged": 0}
        bench = self._set_up(experiment, pays=False)
        self._load(bench, parcel, state)
        judged = self._judge(bench)
        if own and self._models is not None and state:
            self._write_own(bench, self._models / self._kept(experiment, parcel).name[:12], parcel)
        elif own:
            self._note(NEVER)
        return judged

    def _write_own(self, bench: _Bench, directory: Path, parcel: Parcel) -> None:
        digest = question_of(Parcel(arrays=parcel.arrays))
        if settled(directory, digest):
            return
        with torch.no_grad():
            said = write_own(
                directory,
                self.directory,
                self.folder.cache,
                name=self.folder.name,
                model=bench.model,
                experiment=bench.experiment,
                splits=bench.splits,
            )
        self._note(f"a run is over: {said}, by shared weights of SHA-256 {digest}")

    def _kept(self, experiment: Experiment, parcel: Parcel) -> Path:
        """The folder of the run that a question is of."""
        return run_folder(self.directory, recipe_digest(experiment), place_of(parcel)[0])

    def _given(self, experiment: Experiment, kept: Path, number: int, question: str) -> Parcel | None:
        """The answer to this very question, if it was given before.

        Raises:
            FederationError: it was refused before: trained again, it would be paid for again.
            PrivacyError: the round of this run, or a later one, was answered to another question: privacy is paid by
                the round.
        """
        found = kept_states(kept)
        for state in found:
            if state["round"] == number and state["question"] == question:
                if state.get("refused"):
                    raise FederationError(state["refused"])
                arrays = {name: value.numpy() for name, value in state["answer"].items()}
                return Parcel(text=json.loads(state["text"]), arrays=arrays)
        done = max((int(state["round"]) for state in found), default=-1)
        if experiment.privacy.on and done >= number:
            raise PrivacyError(
                f"site {self.folder.name}: round {number + 1} was trained and answered before, with other weights. A "
                "second answer is not in the plan of noise. Begin a new federation, with another seed"
            )
        return None

    def _runtime(
        self, bench: _Bench, number: int, optimizer: dict[str, Any] | None, correction: Mapping[str, torch.Tensor]
    ) -> SiteRuntime | PrivateSiteRuntime:
        """What trains this round: plainly, or under the privacy that the whole federation was planned with.

        FedProx pulls to where the round began: the global weights, and of those that stay here the site's own.
        """
        experiment = bench.experiment
        federation, device = experiment.federation, resolve_device(experiment.device)
        mu = federation.proximal_mu if federation.strategy == "fedprox" else 0.0
        if bench.plan is None:
            return SiteRuntime(device, mu=mu, correction=correction, optimizer=optimizer)
        if self._charge is not None:
            self._charge(bench.plan, bench.steps)
        return PrivateSiteRuntime(
            bench.plan,
            experiment.privacy,
            device=device,
            groups=self._groups(bench.splits.train),
            mu=mu,
            done=number * bench.steps,
            seed=experiment.seed + number,
            optimizer=optimizer,
        )

    def _first(self, bench: _Bench, weights: Weights, number: int) -> FirstRound:
        statistics = statistics_of(bench.model)
        moved = {name: value for name, value in weights.items() if name not in statistics}
        farthest = reach(bench.experiment, moved, bench.steps, number=number)
        return FirstRound(farthest=farthest, statistics=statistics)

    def _judge(self, bench: _Bench) -> dict[str, Any]:
        """Metrics of the weights just loaded on the site's validation cases, where it has any."""
        if bench.validate is None or _discreet(bench.experiment):
            return {"metrics": {}, "judged": 0}
        bench.model.eval()
        with torch.no_grad():
            found = bench.validate(bench.model)
        finite = {name: float(value) for name, value in found.items() if math.isfinite(value)}
        return {"metrics": finite, "judged": len(bench.splits.val)}

    # -- what is built once, and what is kept
    # -----------------------------------------------------------------------------

    def _asked(self, parcel: Parcel) -> Experiment:
        try:
            return Experiment.model_validate(parcel.text["experiment"])
        except (KeyError, ValidationError) as error:
            raise FederationError(
                f"site {self.folder.name}: the server's experiment isn't valid here ({error}). Do both sides run the "
                "same version?"
            ) from None

    def _set_up(self, asked: Experiment, *, pays: bool = True) -> _Bench:
        """What the run needs. Whether it may be had at all is settled before any image is read.

        Args:
            asked: by the server.
            pays: for training; a look at weights that were trained before costs nothing.
        """
        experiment = local_experiment(asked)
        if self._bench is not None and self._bench.experiment == experiment:
            return self._bench
        manifest, kind, classes = self.manifest, self.manifest.task, len(self.manifest.classes)
        splits = make_splits(manifest, experiment.split, experiment.split.seed)
        patients = len(set(self._groups(splits.train)))
        if patients < self._fewest:
            rule = f"fewer than fewest={self._fewest}: too few to hide among. Hold back fewer (split.test, split.folds)"
            raise WithheldError(
                f"site {self.folder.name!r} refuses: the patients that would train are {rule}",
                f"{patients} patients would train, {rule}",
            )
        steps = _steps(experiment, len(splits.train))
        plan = self._plan(experiment, splits, steps)
        if plan is not None and self._charge is not None and pays:
            self._charge(plan, 0)
        store = PreparedStore.open_or_build(manifest, experiment.preprocess, Path(self.folder.cache))
        device = resolve_device(experiment.device)
        model = new_model(experiment, manifest).to(device)
        validate = None
        if len(set(self._groups(splits.val))) >= max(1, self._fewest):
            validate = make_validate(
                store, splits.val, experiment, kind=kind, num_classes=classes, runtime=LocalRuntime(device)
            )
        self._bench = _Bench(
            experiment=experiment,
            model=model,
            fresh={name: value.detach().clone() for name, value in model.state_dict().items()},
            loader=train_loader(store, splits.train, experiment, kind=kind, num_classes=classes),
            loss=build_loss(experiment.loss, kind=kind, num_classes=classes),
            validate=validate,
            shared=shared_names(model, experiment.federation),
            splits=splits,
            steps=steps,
            plan=plan,
        )
        return self._bench

    def _plan(self, experiment: Experiment, splits: Splits, steps: int) -> PrivacyPlan | None:
        """Noise and sample rate of the whole run; None without privacy. The accountant takes a while."""
        if not experiment.privacy.on:
            return None
        groups = self._groups(splits.train)
        units = len(set(groups)) if experiment.privacy.unit == "patient" else len(groups)
        try:
            return plan_privacy(
                experiment.privacy,
                units=units,
                batch_size=min(experiment.train.batch_size, units),
                steps=experiment.federation.rounds * steps,
            )
        except PrivacyError as error:
            if self._charge is None:  # a simulation, where all is known
                raise
            raise WithheldError(
                f"site {self.folder.name!r} refuses: privacy.epsilon and privacy.delta can't be held with the patients "
                "here. Take a smaller delta, a larger epsilon or fewer rounds; the site's own audit log says more",
                str(error),
            ) from None

    def _groups(self, cases: Sequence[int]) -> list[str]:
        """The patient of each case."""
        return [self.manifest.cases[index].group for index in cases]

    def _load(self, bench: _Bench, parcel: Parcel, state: Mapping[str, Any]) -> None:
        """Set the network to the server's weights and this site's own, of the state of a round before.

        Raises:
            FederationError: not exactly the weights that are shared.
        """
        weights, correction = parted(cast(dict[str, Any], dict(parcel.arrays)))
        wanted = set(bench.shared) - statistics_of(bench.model)
        corrected = bench.experiment.federation.strategy == "scaffold"
        if set(weights) != set(bench.shared) or set(correction) != (wanted if corrected else set()):
            odd = sorted((set(weights) ^ set(bench.shared)) or (set(correction) ^ wanted))[0]
            raise FederationError(
                f"site {self.folder.name}: the server's weights don't fit: {odd!r} is on one side only"
            )
        if bench.experiment.privacy.on:  # what takes gradients of samples may leave its hooks in the network
            bench.model = new_model(bench.experiment, self.manifest).to(resolve_device(bench.experiment.device))
        bench.model.load_state_dict(bench.fresh)
        bench.model.load_state_dict(state.get("own", {}), strict=False)
        put(bench.model, weights)

    def _keep(
        self,
        bench: _Bench,
        kept: Path,
        number: int,
        runtime: SiteRuntime | PrivateSiteRuntime,
        residual: Weights,
        question: str,
        answer: Parcel,
    ) -> None:
        own = {
            name: value.detach().cpu().clone()
            for name, value in bench.model.state_dict().items()
            if name not in bench.shared
        }
        state = {
            "round": number,
            "own": own,
            "optimizer": None if runtime.optimizer is None else runtime.optimizer.state_dict(),
            "residual": _tensors(residual),
            "question": question,
            "text": json.dumps(dict(answer.text)),
            "answer": _tensors(answer.arrays),
        }
        keep_state(kept, state, forgets=self._note)

    def _refuse(
        self, kept: Path, number: int, before: Mapping[str, Any], question: str, error: FederationError
    ) -> None:
        """Keep a refusal as the round's answer; the site goes on from where it was before the round."""
        state = {
            "round": number,
            "own": before.get("own", {}),
            "optimizer": before.get("optimizer"),
            "residual": before.get("residual", {}),
            "question": question,
            "text": "{}",
            "answer": {},
            "refused": str(error),
        }
        keep_state(kept, state, forgets=self._note)


def _discreet(experiment: Experiment) -> bool:
    """Whether no figure may leave: an exact one would be private data let out."""
    return experiment.privacy.on or experiment.federation.privacy.on


def _steps(experiment: Experiment, cases: int) -> int:
    """Optimiser steps of one round."""
    federation, train = experiment.federation, experiment.train
    if federation.local_steps is not None:
        return federation.local_steps
    return federation.local_epochs * math.ceil(cases * train.samples_per_case / train.batch_size)


def _tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def opener(folders: tuple[SiteFolder, ...]) -> Callable[[int], SiteWorker]:
    """A site's worker by its number, picklable."""
    return _Opener(folders)


@dataclass(frozen=True)
class _Opener:
    folders: tuple[SiteFolder, ...]

    def __call__(self, number: int) -> SiteWorker:
        return self.folders[number].open()
