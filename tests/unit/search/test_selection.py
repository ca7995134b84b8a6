"""Who may be champion, and who of those is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from medray.config.selection import SelectConfig
from medray.learn.intervals import Interval
from medray.search.selection import Chooser, Option, Ranked, exact, explain


def option(name: str, accuracy: float, latency: float, *, high: float | None = None, **more: float) -> Option:
    figures = {"accuracy": exact(accuracy), "latency_ms": Interval(latency, latency, high or latency)}
    return Option(name=name, figures=figures | {key: exact(value) for key, value in more.items()})


def chooser(objectives: dict[str, Any] | None = None, **select: Any) -> Chooser:
    return Chooser(select=SelectConfig.model_validate(select), objectives=objectives or {"accuracy": "max"})


def names(ranked: list[Ranked]) -> list[str]:
    return [found.option.name for found in ranked]


SLOW, MIDDLE, FAST = option("slow", 0.95, 90.0), option("middle", 0.92, 20.0), option("fast", 0.7, 5.0)


def test_the_metric_alone_decides_unless_told_otherwise() -> None:
    rule = chooser()
    assert rule.is_plain and names(rule.rank([FAST, SLOW, MIDDLE])) == ["slow", "middle", "fast"]
    assert names(chooser({"accuracy": "min"}).rank([SLOW, FAST])) == ["fast", "slow"]


def test_a_limit_refuses_and_last_ranks_behind() -> None:
    limits = {"latency_ms": 50}
    ranked = chooser(limits=limits).rank([SLOW, MIDDLE, FAST])
    assert names(ranked) == ["middle", "fast", "slow"]
    assert ranked[2].refused and ranked[2].broken[0].excess == pytest.approx(0.8)
    ranked = chooser(limits=limits, on_fail="last").rank([SLOW, FAST])
    assert names(ranked) == ["fast", "slow"] and not ranked[1].refused
    closest = chooser(limits={"latency_ms": 1}, on_fail="last").rank([SLOW, MIDDLE, FAST])
    assert names(closest) == ["fast", "middle", "slow"], "where none keeps it, the one that breaks it least"


def test_a_limit_on_a_cost_is_held_with_the_upper_end_of_its_interval() -> None:
    sure, unsure = option("sure", 0.8, 48.0, high=49.0), option("unsure", 0.9, 48.0, high=51.0)
    rule = chooser(limits={"latency_ms": 50})
    assert names(rule.rank([unsure, sure])) == ["sure", "unsure"]
    assert rule.rank([unsure])[0].refused


def test_accuracy_is_held_by_its_value_and_in_its_direction() -> None:
    wide = Option(name="wide", figures={"accuracy": Interval(0.9, 0.5, 0.99)})
    assert not chooser(limits={"accuracy": 0.9}).rank([wide])[0].refused
    assert chooser(limits={"accuracy": 0.91}).rank([wide])[0].refused
    assert not chooser({"accuracy": "min"}, limits={"accuracy": 0.91}).rank([wide])[0].refused


def test_what_was_not_measured_keeps_no_limit() -> None:
    unknown = Option(name="unknown", figures={"accuracy": exact(0.99)})
    ranked = chooser(limits={"latency_ms": 50}).rank([unknown, FAST])
    assert names(ranked) == ["fast", "unknown"] and ranked[1].refused
    assert math.isinf(ranked[1].broken[0].excess)
    assert "not measured" in explain(chooser(limits={"latency_ms": 1}, on_fail="last"), [ranked[1]], "auc")


def test_the_scorecard_gives_points_for_limits_that_are_kept() -> None:
    limits = {"accuracy": 0.9, "latency_ms": 50, "latency_p95_ms": 60, "memory_mb": 500, "parameters": 1000}
    rule = chooser(rule="scorecard", limits=limits)
    good = {"latency_p95_ms": 25.0, "memory_mb": 400.0, "parameters": 10.0}
    rows = {
        "all": (option("all", 0.91, 20.0, **good), 100),
        "weak": (option("weak", 0.5, 20.0, **good), 60),
        "jumpy": (option("jumpy", 0.99, 20.0, **(good | {"latency_p95_ms": 61.0})), 70),
        "heavy": (option("heavy", 0.99, 20.0, **(good | {"memory_mb": 501.0, "parameters": 2000.0})), 70),
    }
    assert {name: rule.points(row.figures) for name, (row, _) in rows.items()} == {n: p for n, (_, p) in rows.items()}
    ranked = rule.rank([row for row, _ in rows.values()])
    assert names(ranked) == ["all", "jumpy", "heavy", "weak"]
    assert not any(found.refused for found in ranked)
    assert "100 of 100" in explain(rule, ranked, "auc")


def test_a_weighted_expression_is_maximised() -> None:
    rule = chooser(rule="weighted", expression="accuracy - latency_ms / 1000")
    ranked = rule.rank([FAST, SLOW, MIDDLE, Option(name="nothing", figures={"accuracy": exact(1.0)})])
    assert names(ranked) == ["middle", "slow", "fast", "nothing"]
    assert ranked[0].merit == pytest.approx(0.9) and "latency_ms" in rule.needs


def test_pareto_takes_the_balanced_one_of_the_front() -> None:
    rule = chooser({"accuracy": "max", "latency_ms": "min"})
    beaten = option("beaten", 0.91, 25.0)
    ranked = rule.rank([SLOW, beaten, FAST, MIDDLE])
    assert rule.rule == "pareto" and names(ranked)[0] == "middle" and names(ranked)[-1] == "beaten"
    assert [found.on_front for found in ranked] == [True, True, True, False]
    assert "nearest to the ideal" in explain(rule, ranked, "auc")


def test_distances_are_on_the_scale_of_all_trials() -> None:
    """Of two finalists each is the best in something; only the trials say whose lead is large."""
    rule = chooser({"accuracy": "max", "latency_ms": "min"})
    one, other = option("one", 0.90, 10.0), option("other", 0.91, 100.0)
    trials = [option("", 0.5, 1.0).figures, option("", 0.92, 120.0).figures]
    assert names(rule.rank([other, one], reference=trials)) == ["one", "other"]
    trials = [option("", 0.899, 9.0).figures, option("", 0.9101, 5000.0).figures]
    assert names(rule.rank([other, one], reference=trials)) == ["other", "one"]


def test_pareto_under_a_limit_looks_at_those_that_keep_it() -> None:
    rule = chooser({"accuracy": "max", "latency_ms": "min"}, limits={"latency_ms": 10})
    assert names(rule.rank([SLOW, FAST, MIDDLE]))[0] == "fast"


def test_equals_are_told_apart_by_the_tie() -> None:
    first, second = (Option(name=n, figures=FAST.figures, tie=t) for n, t in (("a", -0.5), ("b", -0.1)))
    assert names(chooser().rank([first, second])) == ["b", "a"]


def test_constraints_for_the_sampler_leave_accuracy_and_the_unknown_out() -> None:
    rule = chooser(limits={"latency_ms": 50, "accuracy": 0.9, "size_mb": 1})
    assert rule.constraints({"latency_ms": 75.0, "accuracy": 0.1}) == {"latency_ms": 0.5}
    assert "accuracy" not in rule.for_search().select.limits.given


def test_the_reason_names_what_was_refused_and_what_is_broken() -> None:
    rule = chooser(limits={"latency_ms": 50})
    text = explain(rule, rule.rank([SLOW, FAST]), "auc")
    assert "known to keep every limit (1 of 2)" in text and "Refused: slow" in text
    rule = chooser(limits={"latency_ms": 1}, on_fail="last")
    assert "breaks: latency_ms (5, limit 1)" in explain(rule, rule.rank([FAST]), "auc")
