"""``medray tune``: check, plan, search, fit the champion, report, bundle; within one wall-clock budget.

    runs/<study>/
      study.yaml        what was asked for; --resume reads it
      manifest.json     fingerprint.json     experiment.yaml (trial 0: the plan's own default)
      study.db          every trial, as Optuna stores it
      nas/              where study.nas asks for it: the architecture search, its genotype and a picture of its cells
      trials/<number>/  experiment.yaml, checkpoint, weights, error.txt of each trial; validation.npz of a classifier
      final/<name>/     the finalists, trained with what remains of the budget
      clock.json        what is spent     leaderboard.csv     report.html     result.json     bundle/
      state.json        whether it runs, and who runs it     log.jsonl     every event and log line, workers' too

Every stage reads the files of the one before and resumes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medray.engines.ray.remote import call_all
from medray.engines.ray.session import RaySession, ray_session, usable_cpus
from medray.engines.ray.tune import run_trials
from medray.errors import ConfigError, StorageError
from medray.plan.machine import Machine
from medray.search.driver import StudyDriver
from medray.search.expectation import expected_gain
from medray.search.nas.loop import Found
from medray.search.past import WARM, Proposal, propose, shipped
from medray.search.space import Space
from medray.search.storage import DATABASE
from medray.search.trial import TrialEvent, TrialRecord
from medray.tasks.catalogue import find_task
from medray.tasks.task import Direction
from medray.workflows import architecture
from medray.workflows.asked import Asked, new, resumed
from medray.workflows.clock import Clock
from medray.workflows.conclusion import Concluded, conclude
from medray.workflows.contest import Conclusion
from medray.workflows.diary import Diary
from medray.workflows.events import Kind, Observer, StudyEvent
from medray.workflows.forecast import Forecast
from medray.workflows.mirror import Mirror, mirrored
from medray.workflows.planning import describe, prepare_directory
from medray.workflows.recipe import FIXED, Recipe
from medray.workflows.selecting import Quiet, make_chooser, pick_trial
from medray.workflows.sitting import sitting
from medray.workflows.storage import bring, is_address, place_of
from medray.workflows.training import Trained, load_trained, open_store
from medray.workflows.trial import COSTS, FinalTask, TrialPayload, run_final, run_trial
from medray.workflows.warm import past_of

SHORTEST = 10.0
"""Seconds under which a final fit would come to nothing that a trial's network isn't already."""

MEMBERS = 6
"""Networks of the final fit, at most: beyond, an ensemble gains little and costs as much again to run."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Where a study's fruits lie, and what they came to."""

    directory: Path
    report: Path
    bundle: Path
    champion: str
    headline: str


def tune(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    resume: Path | str | None = None,
    address: str | None = None,
    storage: str | None = None,
    runs: Path = Path("runs"),
    observer: Observer | None = None,
    started: float | None = None,
) -> StudyResult:
    """Run a study to its end, or go on with one.

    Args:
        path: a search space's file; None for ``--resume``.
        overrides: ``data=DIR``, ``study.budget=1h``, ``optim.lr=1e-3``; on resume only ``study.trials``,
            ``study.budget`` and ``study.select`` may change.
        resume: the folder of a study, or its place in a store (``s3://bucket/prefix/name``), which is brought to
            ``runs`` first.
        address: of a Ray cluster; None starts Ray on this machine.
        storage: ``s3://bucket/prefix``, below which the study's folder is kept too; a resumed one remembers its own.
        runs: folder in which a new study's folder is made.
        observer: hears of progress.
        started: epoch seconds from which the budget counts; None for now.

    Raises:
        ConfigError, DataError, StorageError, StudyError: before anything starts where that can be seen; each says what
            to do.
    """
    begun = time.time() if started is None else started
    if isinstance(resume, str) and is_address(resume):
        resume = bring(resume, runs)
    # Workers have other working directories than we.
    if resume is not None:
        directory, asked = resumed(Path(resume).resolve(), overrides)
    else:
        directory, asked = new(path, overrides, runs.resolve(), storage)
    clock = Clock(directory / "clock.json", asked.study.budget, started=begun)
    return _Study(directory, asked, clock, observer, place_of(directory, storage)).run(address)


def _look_around(_: None) -> Machine:
    return Machine.here()


class _Study:
    """One sitting of a study."""

    def __init__(
        self, directory: Path, asked: Asked, clock: Clock, observer: Observer | None, place: str | None = None
    ) -> None:
        self.directory, self.asked, self.clock, self.place = directory, asked, clock, place
        self._observer = observer
        self._best: float | None = None
        self._values: list[float] = []
        self.found: Found | None = None
        train = dict(asked.explicit.get("train") or {})
        self.workers = int(train.setdefault("workers", asked.study.workers_per_trial))
        self.explicit = {**asked.explicit, "train": train}

    def run(self, address: str | None) -> StudyResult:
        done = self.directory / "result.json"
        if done.exists():
            stored = json.loads(done.read_text(encoding="utf-8"))
            self._tell("note", f"{self.directory} has ended already; its report stands")
            with self._mirrored():
                return self._result(stored["champion"], stored["headline"])
        with sitting(self.directory, "study", observer=self._observer) as self._sitting:
            self._observer = self._sitting
            with self._mirrored() as self._mirror:
                return self._sit(address)

    def _mirrored(self) -> AbstractContextManager[Mirror]:
        return mirrored(self.directory, self.place, lambda text: self._tell("note", text))

    def _sit(self, address: str | None) -> StudyResult:
        # A local session's workers share the driver's cores; it starts while the data are being read.
        concurrency, cpus, gpus = self._shares(None)
        self.diary = Diary(self.directory.parent, self.directory.name, lambda text: self._tell("note", text))
        self.diary.study(
            {"data": self.asked.source, "command": self.asked.command, "study": self.asked.study.model_dump()}
        )
        try:
            conclusion = self._stages(address, concurrency, cpus, gpus)
        except BaseException:
            self.diary.end({}, status="FAILED")
            raise
        conclusion.save(self.directory / "result.json", seconds=self.clock.spent)
        self.diary.end({name: value for name, (value, _, _) in conclusion.metrics.items()})
        self._tell("done", conclusion.headline)
        return self._result(conclusion.champion, conclusion.headline)

    def _stages(self, address: str | None, concurrency: int, cpus: int, gpus: float) -> Concluded:
        with ray_session(address=address, threads=cpus) as session:
            if not session.is_local:
                concurrency, cpus, gpus = self._shares(session)
            self.machine = self._machine(session)
            self._prepare()
            self._search_architecture(session, cpus, gpus)
            records, importance, sampler = self._search(concurrency, cpus, gpus)
            finalists = self._final(records, session)
        with self.clock.stage("choice, report, bundle"):
            self._tell("stage", "choosing the champion, writing report and bundle")
            return conclude(
                Conclusion(
                    directory=self.directory,
                    recipe=self.recipe,
                    study=self.asked.study,
                    source=self.asked.source,
                    command=self.asked.command,
                    objective=self.objective,
                    finalists=tuple(finalists),
                    records=tuple(records),
                    importance=importance,
                    sampler=sampler,
                    clock=self.clock,
                    chooser=self.chooser,
                    quiet=self.quiet,
                    found=self.found,
                    slots=concurrency,
                )
            )

    def _result(self, champion: str, headline: str) -> StudyResult:
        return StudyResult(
            directory=self.directory,
            report=self.directory / "report.html",
            bundle=self.directory / "bundle",
            champion=champion,
            headline=headline,
        )

    # Stages ----------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Manifest, fingerprint, plan, prepared cases; the space is tried against the data before anything trains."""
        with self.clock.stage("data and plan"):
            if not (self.directory / "fingerprint.json").exists():
                self._tell("stage", f"checking {self.asked.source}")
                task = str((self.asked.explicit.get("task") or {}).get("kind", "auto"))
                manifest, _ = prepare_directory(
                    self.asked.source, self.directory, task=task, split=self.asked.explicit.get("split")
                )
                for finding in manifest.findings[:5]:
                    self._tell("note", f"{finding.severity}: {finding.message}. {finding.fix}")
            cache = self.directory.parent / ".cache"
            study = self.asked.study
            self.recipe = Recipe(
                directory=str(self.directory),
                explicit=self.explicit,
                cache=str(cache),
                machine=self.machine,
                # There are two finalists, as a rule.
                horizon=study.budget * (1.0 - architecture.share(study.nas)) * (1.0 - study.search_share) / 2,
            )
            default = self.recipe.experiment()
            kind = self.recipe.manifest.task
            self.objectives = self._objectives(kind)
            own = find_task(kind).objective
            self.objective = next(((n, way) for n, way in self.objectives.items() if n.startswith("val/")), own)
            self._sitting.measures(*self.objective)
            self.chooser = make_chooser(study, self.objectives, self.objective, self._metrics(kind))
            self.quiet = Quiet(recipe=self.recipe, budget=study.budget, tell=lambda text: self._tell("note", text))
            metric = self.objective[0].removeprefix("val/")
            self.forecast = Forecast(
                recipe=self.recipe, study=study, chooser=self.chooser, quiet=self.quiet, metric=metric
            )
            architecture.check(study.nas, self.asked.space)
            self.searched: tuple[str, ...] = ()
            if study.nas.strategy is not None:
                self.searched = (architecture.stand_in(self.recipe.manifest, study.nas).name,)
            self.space = Space.parse(architecture.filled(self.asked.space, self.searched))
            for key in self.asked.space:
                if key.split(".")[0] in FIXED:
                    self.recipe.experiment({key: None})
                if key in ("train.workers", "train.min_workers"):
                    raise ConfigError(
                        f"space.{key}: changes how long a trial takes, not what it learns. Set study.workers_per_trial"
                    )
            self.space.validate(self.recipe.experiment)
            text = describe(default, self.recipe.fingerprint, self.recipe.machine)
            (self.directory / "experiment.yaml").write_text(text, encoding="utf-8")
            self._tell("stage", f"preparing {len(self.recipe.manifest.cases)} cases")
            self.recipe.splits(default)
            open_store(self.recipe, default)

    def _search_architecture(self, session: RaySession, cpus: int, gpus: float) -> None:
        """Where ``study.nas`` asks for it: find networks, and put them into the space."""
        nas = self.asked.study.nas
        if nas.strategy is None:
            return
        stage = "architecture search"
        with self.clock.stage(stage):
            spent = self.clock.stages.get(stage, 0.0)
            seconds = max(1.0, min(nas.share * self.clock.budget, self.clock.left + spent))  # of all sittings
            self._tell("stage", f"searching for an architecture by {nas.strategy}: {seconds:.0f} s at most")
            task = architecture.SearchTask(
                recipe=self.recipe,
                nas=nas,
                directory=str(self.directory / "nas"),
                seconds=seconds,
                seed=self.asked.study.seed,
                workers=self.workers,
                cpus=max(cpus, usable_cpus() if session.is_local else 0),  # nothing else runs in this phase
                gpus=int(gpus > 0),
            )
            found = self.found = architecture.find(task, while_waiting=lambda: self.clock.save(every=2.0))
            self.searched = tuple(genotype.name for genotype in found.genotypes)
            self.space = Space.parse(architecture.filled(self.asked.space, self.searched))
            self._tell("note", f"found in {found.steps} steps: {self.searched[0]}")

    def _objectives(self, kind: str) -> dict[str, Direction]:
        asked = dict(self.asked.study.objectives) or dict([find_task(kind).objective])
        known = self._metrics(kind)
        for name in asked:
            if name not in known and name not in COSTS:
                raise ConfigError(
                    f"study.objectives: {name!r} is not measured for {kind}; choose from {', '.join([*known, *COSTS])}"
                )
        if not any(name in known for name in asked):
            raise ConfigError(f"study.objectives: name at least one of {', '.join(known)}; costs alone choose no model")
        return asked

    @staticmethod
    def _metrics(kind: str) -> list[str]:
        return [f"val/{name}" for name in find_task(kind).metrics]

    def _search(self, concurrency: int, cpus: int, gpus: float) -> tuple[list[TrialRecord], Mapping[str, float], str]:
        study = self.asked.study
        if study.trials == 1 or not len(self.space):
            return [], {}, "none: the plan's default alone"
        if self.forecast.measures:
            with self.clock.stage("measuring"):
                self._tell("stage", "measuring what the default costs to run")
                self.quiet.rehearse()
        with self.clock.stage("search"), self._driver() as driver:
            self._searching = driver
            # A search that has begun goes on: whether it is worth its time was settled then.
            # One that was not worth it isn't begun after half a final fit, on a machine that is quieter by then.
            known = driver.records()
            if not known and (self.directory / "final").exists():
                return [], {}, "none: its time went to the final fit"
            # A group's steps, and those of another machine, can't be timed here.
            here = self.workers == 1 and self.machine == Machine.here()
            telling = self.forecast.telling(cpus) if here and not known else 0.0
            plan = self.forecast.budget(
                self.clock, self.space, known, self._best_record(known), concurrency=concurrency, telling=telling
            )
            if driver.has_next and plan.search > plan.trial / 2 > 0:
                self._tell(
                    "stage",
                    f"searching for {plan.search:.0f} s: trials of {plan.trial:.0f} s, {concurrency} at once",
                )
                for found in driver.proposals:
                    far = f"distance {found.distance:.1f}, {found.gain:+.4f} over the default there"
                    self._tell("note", f"early trial from {found.origin} ({far})")
                run_trials(
                    driver,
                    run_trial,
                    directory=self.directory,
                    cpus_per_trial=cpus,
                    gpus_per_trial=gpus,
                    concurrency=concurrency,
                    in_group=self.workers > 1,
                    trial_seconds=plan.trial,
                    deadline=time.time() + plan.search,
                    before_trial=lambda: self.forecast.before_trial(self.space, driver.records()),
                    payload=TrialPayload(
                        recipe=self.recipe,
                        objective=self.objective,
                        objectives=tuple(self.objectives),
                        chooser=self.chooser.for_search(),
                    ),
                    on_event=self._on_trial,
                )
            elif telling and plan.trials == 0 and not known:
                self._tell("note", f"no search: of trials that tell anything ({telling:.0f} s here) too few would fit")
                return [], {}, f"none: a trial that tells anything takes {telling:.0f} s here, too long for the budget"
            return driver.records(), dict(driver.importance().shares), driver.sampler_name

    def _driver(self) -> StudyDriver:
        defaults = self.space.read(self.recipe.experiment().model_dump(mode="json"))
        study = self.asked.study
        proposals: list[Proposal] = []
        if study.warm_start and not (self.directory / DATABASE).exists():  # a study that has begun keeps its own
            proposals = propose(
                self.space,
                defaults,
                self.recipe.fingerprint,
                [*past_of(self.directory, self.recipe), *shipped()],
                objective=self.objective[0],
                count=min(WARM, study.trials // 4),
            )
        return StudyDriver(self.space, study, self.objectives, self.directory, defaults, proposals)

    def _final(self, records: Sequence[TrialRecord], session: RaySession) -> list[tuple[str, Trained]]:
        """Train trial 0's experiment, and the best trial's where that is another, with what remains: each as long."""
        best = self._best_record(records) if self.chooser.is_plain else self._pick(records)
        plans: list[tuple[str, Mapping[str, Any]]] = [("default", {})]
        if best is not None and not best.is_default:
            plans.append((f"trial-{best.number}", best.params))
        elif best is None and self.searched and not any(record.values is not None for record in records):
            plans.append((architecture.SEARCHED, {"model.name": self.searched[0]}))  # which no trial has tried
        finish = self.forecast.finish([params for _, params in plans])
        open_plans = [plan for plan in plans if self._finalist(plan[0]) is None]
        parallel = len(open_plans) if session.gpus >= len(open_plans) * self.workers else 1
        with self.clock.stage("final fit"):
            while open_plans:
                seconds = (self.clock.left - finish) * parallel / len(open_plans)
                if seconds < SHORTEST and len(open_plans) < len(plans):
                    break
                if seconds < SHORTEST:
                    searched = self._as_searched(records, best)
                    if searched:
                        self._tell("note", "no time is left for a final fit: the trials' own networks stand")
                        return searched
                    # A study that ends with nothing has wasted all of its time, not a little more.
                    self._tell("note", f"too short a budget for this machine: {SHORTEST:.0f} s more for one network")
                    seconds, open_plans = SHORTEST, open_plans[:1]
                now, open_plans = open_plans[:parallel], open_plans[parallel:]
                names = " and ".join(name for name, _ in now)
                self._tell("stage", f"final fit of {names}: {seconds:.0f} s")
                self._run_final([self._final_task(name, params, seconds) for name, params in now], session, parallel)
            found = [(name, trained) for name, _ in plans if (trained := self._finalist(name)) is not None]
            twins = self._twins(plans, found, session) if self.asked.study.ensemble else []
            before = [] if self.chooser.is_plain else self._fitted_before(dict(plans))
        return [*found[:1], *before, *found[1:], *twins]  # the gain is stated over the first, the default

    def _fitted_before(self, besides: Collection[str]) -> list[tuple[str, Trained]]:
        """Finalists of an earlier sitting that the rule then had put first."""
        names = sorted({path.name for path in (self.directory / "final").glob("*")} - set(besides))
        found = [(name, self._finalist(name)) for name in names if "-twin-" not in name]
        return [(name, trained) for name, trained in found if trained is not None]

    def _twins(
        self,
        plans: Sequence[tuple[str, Mapping[str, Any]]],
        found: Sequence[tuple[str, Trained]],
        session: RaySession,
    ) -> list[tuple[str, Trained]]:
        """Where the finalists reached ``train.epochs`` with time to spare: the better one again, with other seeds.

        On small data this is the common case, and the mean of several networks is the surest gain that more time can
        buy (Lakshminarayanan et al., Deep ensembles, NeurIPS 2017).
        """
        metric, direction = self.objective
        sign = 1.0 if direction == "max" else -1.0
        # The last is the one that the rule picked; a default beside it may break a limit.
        leads = found if self.chooser.is_plain else found[-1:]
        lead, trained = max(leads, key=lambda pair: sign * pair[1].fit.best.get(metric, -sign * math.inf))
        params = dict(plans)[lead]
        twins: list[tuple[str, Trained]] = []
        for number in range(1, MEMBERS - len(found) + 1):
            name = f"{lead}-twin-{number}"
            known = self._finalist(name)
            reserve = self.forecast.finish(
                [*(dict(plans)[fitted] for fitted, _ in found), *[params] * (len(twins) + 1)]
            )
            if known is None:
                if self.clock.left - reserve < 1.1 * trained.fit.seconds + 3.0:
                    break
                self._tell("stage", f"final fit of {name}: at most {self.clock.left - reserve:.0f} s")
                self._run_final([self._final_task(name, params, self.clock.left - reserve, twin=number)], session, 1)
                known = self._finalist(name)
            if known is not None:
                twins.append((name, known))
        return twins

    def _finalist(self, name: str) -> Trained | None:
        return load_trained(self.recipe, self.directory / "final" / name)

    def _final_task(self, name: str, params: Mapping[str, Any], seconds: float, *, twin: int = 0) -> FinalTask:
        return FinalTask(
            recipe=self.recipe,
            params=dict(params),
            objective=self.objective,
            directory=str(self.directory / "final" / name),
            seconds=seconds,
            deadline=time.time() + seconds + 5.0,
            twin=twin,
        )

    def _run_final(self, tasks: Sequence[FinalTask], session: RaySession, parallel: int) -> None:
        gpus = 1 if session.gpus >= 1 else 0
        most = int(session.cpus)
        cpus = usable_cpus() if session.is_local else max(1, min(8 * self.workers, most))
        share = max(1, cpus // parallel)
        alone = self.workers == 1
        call_all(
            run_final,
            [replace(task, cpus=share) for task in tasks],
            cpus=share if alone else 0,  # one that leads a group of processes only waits for it
            gpus=gpus if alone else 0,
            while_waiting=lambda: self.clock.save(every=2.0),
        )

    def _pick(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        """The trial that the study's rule puts first, looked at again now that no other trial runs."""
        with self.clock.stage("measuring"):
            if records and self.forecast.measures:
                self._tell("stage", "measuring what the best trials cost to run, now that nothing else runs")
            best, keeps = pick_trial(records, self.chooser, self.objective[0], self.quiet)
        if best is None and any(record.values is not None for record in records):
            self._tell("note", "no trial keeps the limits of study.select: the default is fitted alone")
        elif best is not None and not keeps:
            self._tell("note", f"no trial keeps the limits of study.select; trial {best.number} breaks them least")
        return best

    def _as_searched(self, records: Sequence[TrialRecord], best: TrialRecord | None) -> list[tuple[str, Trained]]:
        found: list[tuple[str, Trained]] = []
        for record in (records[0] if records else None, best):
            if record is None or any(name == f"trial-{record.number}" for name, _ in found):
                continue
            trained = load_trained(self.recipe, Path(record.directory))
            if trained is not None:
                found.append(("default" if record.is_default else f"trial-{record.number}", trained))
        return found

    def _best_record(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        name, direction = self.objective
        position = list(self.objectives).index(name) if name in self.objectives else 0
        sign = 1.0 if direction == "max" else -1.0
        completed = [record for record in records if record.values is not None]
        return max(completed, key=lambda record: sign * record.values[position], default=None)  # type: ignore[index]

    # Resources and events --------------------------------------------------------------------------------------------

    def _shares(self, session: RaySession | None) -> tuple[int, int, float]:
        """Trials at once, CPUs and GPUs of each."""
        cpus = int(session.cpus) if session else usable_cpus()
        most = int(min(cpus, session.most_cpus * self.workers)) if session else cpus  # what one machine can give
        gpus = session.gpus if session else float(Recipe(directory="", explicit={}, cache="").machine.gpus)
        if gpus >= 1:
            concurrency = self.asked.study.concurrency or max(1, int(gpus) // self.workers)
            share = 1.0 if self.workers > 1 else min(1.0, gpus / concurrency)
            return concurrency, max(self.workers, min(most, cpus // max(concurrency, 1))), share
        # Two processes on two cores give 1.13 times the throughput of one with two threads, but half the pace of each
        # trial: from four cores on, trials run side by side.
        concurrency = self.asked.study.concurrency or max(1, cpus // max(2, self.workers))
        concurrency = min(concurrency, max(1, cpus // self.workers))
        return concurrency, max(1, min(most, cpus // concurrency)), 0.0

    def _machine(self, session: RaySession) -> Machine:
        """What the plan is made for: on a cluster with GPUs a machine that has one, which the driver's may not."""
        here = Machine.here()
        if session.is_local or session.gpus < 1 or here.gpus:
            return here
        self._tell("stage", "waiting for a machine with a GPU")
        return call_all(_look_around, [None], cpus=1, gpus=1)[0]

    def _on_trial(self, event: TrialEvent) -> None:
        kinds: dict[str, Kind] = {
            "started": "trial-started",
            "progress": "trial-progress",
            "retried": "note",
            "pruned": "trial-pruned",
            "completed": "trial-completed",
            "failed": "trial-failed",
        }
        name, direction = self.objective
        value = event.metrics.get(name)
        if value is not None and math.isfinite(value):
            better = max if direction == "max" else min
            self._best = value if self._best is None else better(self._best, value)
            if event.kind == "completed":
                self._values.append(value)
        self.clock.save(every=2.0)
        if event.kind in ("pruned", "completed", "failed"):
            self.diary.trial(event.number, event.kind, event.params, event.metrics)
            try:
                self._mirror.now()  # before it is said to have ended
            except StorageError as error:
                self._searching.fatal = str(error)
        elif event.kind == "progress":
            self._mirror.soon()
        self._tell(
            kinds[event.kind], event.message, trial=event.number, fraction=event.fraction, metrics=dict(event.metrics)
        )

    def _tell(self, kind: Kind, text: str = "", **more: Any) -> None:
        if self._observer is None:
            return
        self._observer(
            StudyEvent(
                kind=kind,
                text=text,
                best=self._best,
                elapsed=self.clock.spent,
                budget=self.clock.budget,
                expected_gain=expected_gain(self._values, self.objective[1]) if self._values else None,
                **more,
            )
        )
