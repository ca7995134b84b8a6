from __future__ import annotations

import math

from medray.search.pruning import asha, median, never
from medray.search.pruning import curve as at_its_pace


def curve(*losses: float, upto: float = 1.0) -> list[tuple[float, tuple[float, ...]]]:
    """A trial with nine validations in its schedule, as far as it came."""
    points = [((index + 1) / 9, (loss,)) for index, loss in enumerate(losses)]
    return [point for point in points if point[0] <= upto + 1e-9]


def test_the_first_trial_goes_on() -> None:
    assert not asha({0: curve(5.0)}, 0)


def test_only_the_best_third_passes_a_rung() -> None:
    seen = {number: curve(float(number)) for number in range(9)}
    passed = [number for number in seen if not asha(seen, number)]
    assert passed == [0, 1, 2]


def test_between_rungs_nothing_is_stopped() -> None:
    seen = {number: curve(float(number), float(number)) for number in range(6)}
    assert not any(asha(seen, number) for number in seen)


def test_the_second_rung_compares_those_that_came_there() -> None:
    seen = {0: curve(1.0, 1.0, 1.0), 1: curve(2.0, 2.0, 0.5), 2: curve(0.0)}
    assert asha(seen, 0)
    assert not asha(seen, 1)


def test_a_report_that_jumps_a_rung_is_judged_at_both() -> None:
    jumped = [(0.4, (3.0,))]
    assert asha({0: curve(1.0), 1: jumped}, 1)
    assert not asha({0: curve(4.0), 1: jumped}, 1)


def test_ties_pass() -> None:
    assert not asha({0: curve(1.0), 1: curve(1.0)}, 1)


def test_a_diverged_trial_is_stopped() -> None:
    assert asha({0: curve(9.0), 1: [(1 / 9, (math.inf,))]}, 1)
    assert asha({0: curve(9.0), 1: [(1 / 9, (math.nan,))]}, 1)


def test_with_several_objectives_the_front_passes() -> None:
    def at(*losses: float) -> list[tuple[float, tuple[float, ...]]]:
        return [(1 / 9, losses)]

    seen = {0: at(0.0, 3.0), 1: at(1.0, 2.0), 2: at(3.0, 0.0), 3: at(4.0, 4.0)}
    assert [number for number in seen if not asha(seen, number)] == [0, 1, 2]


def test_median_waits_for_company() -> None:
    seen = {number: curve(1.0, 1.0) for number in range(4)} | {4: curve(9.0, 9.0)}
    assert median(seen, 4)
    seen.pop(0)
    assert not median(seen, 4)


def test_median_compares_the_best_so_far_at_the_same_stage() -> None:
    others = {number: curve(5.0, 4.0 - number / 10, 0.0, 0.0) for number in range(5)}
    assert not median(others | {9: curve(3.0, 9.0)}, 9), "its best so far is 3"
    assert median(others | {9: curve(6.0, 4.5)}, 9)
    assert not median(others | {9: [(0.05, (9.0,))]}, 9), "before the first rung"


def test_median_counts_those_that_were_stopped_before() -> None:
    seen = {number: curve(1.0, 1.0) for number in range(3)} | {number: curve(9.0) for number in range(3, 8)}
    own = {9: curve(2.0, 2.0)}
    assert not median(seen | own, 9, ended=range(8)), "five of eight are worse"
    assert not median(seen | own, 9, ended=()), "three have come as far, too few to judge"


def test_never() -> None:
    assert not never({0: curve(1.0), 1: curve(9.0)}, 1)


# At its pace ---------------------------------------------------------------------------------------------------------


def test_who_would_end_behind_what_another_has_reached_is_stopped() -> None:
    seen = {0: curve(*[0.9 - 0.05 * n for n in range(9)])}  # ends at 0.5
    slow, fast = curve(0.9, 0.88, 0.86), curve(0.9, 0.84, 0.78)
    assert at_its_pace(seen | {1: slow}, 1), "0.02 a ninth: 0.74 in the end"
    assert not at_its_pace(seen | {1: fast}, 1), "0.06 a ninth: 0.42 in the end"
    assert not at_its_pace({1: slow}, 1), "there is no other"


def test_the_pace_is_that_of_the_latter_half_and_of_the_best_reports() -> None:
    seen = {0: curve(*[0.55] * 9)}
    steep_then_flat = curve(2.0, 1.2, 0.7, 0.65, 0.64, 0.63)
    assert at_its_pace(seen | {1: steep_then_flat}, 1), "0.023 a ninth since a third: 0.56 in the end"
    flat_then_steep = curve(2.0, 2.0, 2.0, 1.9, 1.5, 1.0)
    assert not at_its_pace(seen | {1: flat_then_steep}, 1)
    noisy = curve(0.9, 0.8, 0.7, 0.95, 0.6, 0.66)
    assert not at_its_pace(seen | {1: noisy}, 1), "its best stands, not its last report"


def test_nothing_is_said_of_first_steps_nor_at_the_end() -> None:
    seen = {0: curve(*[0.1] * 9)}
    assert not at_its_pace(seen | {1: curve(0.9, 0.9)}, 1), "two ninths"
    assert at_its_pace(seen | {1: curve(0.9, 0.9, 0.9)}, 1)
    assert not at_its_pace(seen | {1: curve(*[0.9] * 9)}, 1), "what has run to its end has ended"
    assert not at_its_pace(seen | {1: [(0.5, (0.9,))]}, 1), "one report has no pace"


def test_with_several_objectives_it_must_fall_behind_in_all() -> None:
    seen = {0: [(1.0, (0.5, 20.0))]}
    small = [(1 / 9, (0.9, 10.0)), (1 / 3, (0.8, 10.0))]
    large = [(1 / 9, (0.9, 20.0)), (1 / 3, (0.85, 20.0))]
    assert not at_its_pace(seen | {1: small}, 1), "slower to learn, but it costs less"
    assert at_its_pace(seen | {1: large}, 1), "0.7 in the end, and no cheaper"


def test_what_breaks_a_limit_is_stopped_once_another_keeps_it() -> None:
    broken = [(1 / 9, (math.inf,)), (1 / 3, (math.inf,))]
    assert at_its_pace({0: curve(0.9), 1: broken}, 1)
    assert not at_its_pace({0: [(1.0, (math.inf,))], 1: broken}, 1), "nobody keeps it"
    late = [(1 / 9, (math.nan,)), (1 / 3, (0.9,))]
    assert not at_its_pace({0: curve(*[0.1] * 9), 1: late}, 1), "it has only just begun to learn"
