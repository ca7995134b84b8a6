"""What the stages of a study will take, so that its budget is shared out and its end kept free.

Nothing is looked up: a case of each network that may be champion, an optimiser step of the default and one look at what
it costs to run are timed here. What trials took replaces what was expected of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from medray.config.schema import Experiment, StudyConfig
from medray.search.budget import TELLING_STEPS, Budget, plan_budget
from medray.search.selection import MEASURED, Chooser
from medray.search.space import Space
from medray.search.trial import TrialRecord
from medray.workflows.clock import Clock
from medray.workflows.contest import robustness_seconds
from medray.workflows.costs import changes_costs, untrained
from medray.workflows.judging import GLANCE
from medray.workflows.probe import time_case, time_step
from medray.workflows.recipe import Recipe
from medray.workflows.selecting import LOOKED, SHARE, Quiet

REPORT = 12.0
"""Seconds of the report, its pictures and tables."""
EXPORT, LAYER, MILLION = 5.0, 0.02, 0.15
"""Seconds that a bundle takes for a network, each of its layers (the export walks through them) and 10^6 parameters.

U-Net of 56 layers and 1.8 million: 6 s; ResNet-50, 217 and 24: 14; UNETR, 262 and 99: 37; all on a busy core or two.
"""
ENSEMBLES = 3
"""Ensembles that a rule which weighs costs looks at, as a rule; more where there is time."""


@dataclass(kw_only=True)
class Forecast:
    """Of one study.

    Attributes:
        metric: of the study, without its ``val/``.
    """

    recipe: Recipe
    study: StudyConfig
    chooser: Chooser
    quiet: Quiet
    metric: str
    _cases: dict[str, float] = field(default_factory=dict)
    _exports: dict[str, float] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        """Whether the study has to measure what networks cost to run."""
        return not self.chooser.needs.isdisjoint(MEASURED)

    def budget(
        self, clock: Clock, space: Space, records: Sequence[TrialRecord], best: TrialRecord | None, *, concurrency: int,
        telling: float,
    ) -> Budget:  # fmt: skip
        """Share out what is left of the study's time.

        Args:
            clock: of the study.
            space: what the trials vary.
            records: of trials that there are already.
            best: of those, if any.
            concurrency: trials at once.
            telling: seconds that a trial has to train for, at least; see :meth:`telling`.
        """
        study, spent = self.study, clock.spent
        rival: Mapping[str, Any] = {} if best is None else best.params
        return plan_budget(
            study.budget,
            trials=study.trials,
            search_share=study.search_share,
            concurrency=concurrency,
            pruner=study.pruner,
            spent=spent,
            start_up=min(spent, sum(clock.stages.values()) - clock.stages.get("search", 0.0)),
            finish=self.finish([{}, rival]),
            measuring=self._look(records) if self.measures else 0.0,
            networks=self._unmeasured(space, records),
            shortest=telling,
        )

    def before_trial(self, space: Space, records: Sequence[TrialRecord]) -> float:
        """Seconds that the next trial may take until it trains: where its network may be one that was not measured."""
        return self._look(records) if self.measures and self._unmeasured(space, records) > 0 else 0.0

    def telling(self, threads: int) -> float:
        """Seconds that a trial has to train for until its validation says more than chance; 0 where a step fails.

        Args:
            threads: that it computes with.
        """
        default = self.recipe.experiment()
        validations = 2 * min(GLANCE, len(self.recipe.splits(default).val)) * self.case_seconds(default)
        step = time_step(self.recipe, threads=threads)
        return 0.0 if step is None else TELLING_STEPS * step + validations

    def finish(self, networks: Sequence[Mapping[str, Any]]) -> float:
        """Seconds that choice, robustness, report and bundle will take.

        Args:
            networks: the parameters of each finalist; empty for the default.
        """
        experiments = [self.recipe.experiment(params) for params in networks]
        splits = self.recipe.splits(experiments[0])
        one_each = sum(map(self.case_seconds, experiments))
        scoring = 1.15 * one_each * (len(splits.val) + len(splits.test))
        robustness = robustness_seconds(self.study.budget, self.recipe.manifest.task, one_each)
        looking = self._looking(len({_network(experiment) for experiment in experiments}))
        return REPORT + sum(map(self._export, experiments)) + scoring + robustness + looking

    def case_seconds(self, experiment: Experiment) -> float:
        """Seconds that one network takes to be scored on one case."""
        return self._once(self._cases, experiment, self._time_case)

    def _time_case(self, experiment: Experiment) -> float:
        return time_case(self.recipe, experiment, self.recipe.splits(experiment).val, self.metric)

    def _export(self, experiment: Experiment) -> float:
        return self._once(self._exports, experiment, self._count_export)

    def _count_export(self, experiment: Experiment) -> float:
        model = untrained(self.recipe, experiment).lead.model
        size = sum(p.numel() for p in model.parameters()) / 1e6
        return EXPORT + LAYER * sum(1 for _ in model.modules()) + MILLION * size

    @staticmethod
    def _once(known: dict[str, float], experiment: Experiment, measure: Callable[[Experiment], float]) -> float:
        key = _network(experiment)
        if key not in known:
            known[key] = measure(experiment)
        return known[key]

    def _look(self, records: Sequence[TrialRecord]) -> float:
        """Seconds that a trial takes to find out what its network costs, where nobody has."""
        looked = [record.measuring for record in records if record.measuring > LOOKED]
        return mean(looked) if looked else self.quiet.first_look

    def _unmeasured(self, space: Space, records: Sequence[TrialRecord]) -> float:
        """Networks of the space that no trial has had yet, the default's not counted; at most."""
        paths = [parameter.path for parameter in space if changes_costs(parameter.path)]
        seen = {tuple(repr(record.params.get(path)) for path in paths) for record in records}
        return max(0.0, space.variants(paths) - max(1, len(seen)))

    def _looking(self, networks: int) -> float:
        """Seconds of quiet looks at so many distinct networks before one is crowned, and at what is made of them."""
        if not self.measures:
            return 0.0
        # By the metric: the winner, and an ensemble or a network that the search did not see.
        looks = 2 if self.chooser.rule == "best" else networks + 1 + (ENSEMBLES if self.study.ensemble else 0)
        expected = self.quiet.expected
        share = SHARE * self.study.budget - self.quiet.spent + expected
        return max(2 * expected, min(looks * expected, share))


def _network(experiment: Experiment) -> str:
    """What decides how long a network takes for a case."""
    part = experiment.model_dump_json(include={"model", "preprocess", "inference"})
    return f"{part} {experiment.train.patch_size}"
