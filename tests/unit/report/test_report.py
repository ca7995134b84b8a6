"""report.html, rendered from results made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from medray.config.genotype import Genotype
from medray.report import plots
from medray.report.data import (
    Architecture,
    CandidateRow,
    ChoiceRow,
    ClassificationResults,
    Curve,
    DataSummary,
    FrontPoint,
    Gain,
    Interval,
    Picture,
    ReportData,
    Rivalry,
    RobustnessRow,
    SegmentationCase,
    SegmentationResults,
    SelectionSummary,
    SiteRow,
    StudySummary,
    TimeRow,
    TrialRow,
    WarmRow,
)
from medray.report.render import duration, figure, interval, render, value, write_report

NAN = float("nan")
VOID = {"meta", "img", "br", "hr", "input", "link", "source", "col"}


def picture(caption="case-1"):
    return Picture(pixels=np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3), caption=caption)


def summary(**changes):
    fields = {
        "source": "scans/", "task": "segmentation", "ndim": 3, "modality": "CT", "classes": ("background", "tumour"),
        "cases": 20, "patients": 18, "sites": {"north": 12, "south": 8},
        "splits": {"train": 12, "validation": 4, "test": 4}, "shape": "64 x 64 x 32", "spacing": "1 x 1 x 2 mm",
        "class_share": {"background": 0.98, "tumour": 0.02},
        "findings": (("warning", "case-3: constant image", "delete it"),), "examples": (picture(),),
    }  # fmt: skip
    return DataSummary(**(fields | changes))


def trial(number, state, value=None, **changes):
    values = {} if value is None else {"val/dice": value}
    return TrialRow(
        number=number, state=state, params={"optim.lr": 0.00123456}, values=values, seconds=30.0, note="", **changes
    )


def study(**changes):
    fields = {
        "name": "seg", "objective": "val/dice", "direction": "max", "budget": 1200.0, "spent": 1187.0,
        "time": (
            TimeRow(name="search: neither", seconds=40.4, share=0.034),
            TimeRow(name="final fit", seconds=700.0, share=0.59),
        ),
        "sampler": "tpe", "pruner": "asha",
        "trials": (trial(0, "completed", 0.8), trial(1, "failed"), trial(2, "completed", 0.9),
                   trial(3, "pruned", 0.99)),
        "candidates": (
            CandidateRow(name="default", validation=Interval(value=0.8, low=0.7, high=0.85), chosen=False),
            CandidateRow(name="trial-2", validation=Interval(value=0.9, low=0.85, high=0.92), chosen=True),
        ),
        "importance": {"optim.lr": 0.7, "model.name": 0.3},
        "curves": {"final: default": ((10.0, 0.5), (20.0, 0.8)), "trial 0": ((5.0, 0.3), (9.0, 0.6)), "trial 1": ()},
    }  # fmt: skip
    return StudySummary(**(fields | changes))


def segmentation(**changes):
    rows = tuple(
        SegmentationCase(case=f"case-{i}", patient=f"p{i}", site="north", dice=(0.8 + i / 100,), hd95=(3.0,))
        for i in range(3)
    )
    fields = {
        "cases": rows, "overlays": tuple(picture(name) for name in ("best", "median", "worst")),
        "per_class": {"tumour": Interval(value=0.81, low=0.7, high=0.9)}, "hd95_unit": "mm",
    }  # fmt: skip
    return SegmentationResults(**(fields | changes))


def classification(classes=2):
    line = np.linspace(0, 1, 5)
    curve = Curve(name="nodule", x=line, y=line**0.5, area=0.91)
    return ClassificationResults(
        confusion=np.arange(classes * classes).reshape(classes, classes), roc=(curve,), pr=(curve,),
        reliability=(replace(curve, name="before"), replace(curve, name="after", y=np.full(5, NAN))),
        ece=(0.12, 0.03), temperature=1.4,
    )  # fmt: skip


def report(**changes):
    fields = {
        "headline": "trial-2: dice 0.874", "intended_use": "Research use only. Not a medical device.",
        "created": "2026-11-20T12:00:00+00:00", "data": summary(), "study": study(),
        "gain": Gain(
            metric="dice", default=Interval(value=0.8, low=0.75, high=0.84),
            champion=Interval(value=0.874, low=0.85, high=0.893), difference=Interval(value=0.074, low=0.02, high=0.1),
            measured_on="test", cases=4, patients=4,
        ),
        "metrics": {"dice": Interval(value=0.874, low=0.851, high=0.893), "hd95": Interval(value=3.2)},
        "sites": (SiteRow(site="north", cases=3, score=Interval(value=0.9, low=0.8, high=1.0)),),
        "robustness": (
            RobustnessRow(corruption="none", severity=0, score=Interval(value=0.87)),
            RobustnessRow(corruption="low_resolution", severity=2, score=Interval(value=0.7, low=0.6, high=0.8)),
        ),
        "classification": None, "segmentation": segmentation(), "resources": {"Peak memory": "812 MiB"},
        "reproduce": {"Command": "medray tune seg.yaml", "experiment.yaml of default": "model: {name: unet}"},
    }  # fmt: skip
    return ReportData(**(fields | changes))


def classifier(task="classification", classes=("normal", "nodule"), **changes):
    shown = classification(len(classes))
    if task == "multilabel":
        shown = replace(shown, confusion=None)
    return report(
        data=summary(task=task, ndim=2, modality="XR", classes=classes, spacing="none in the files"),
        segmentation=None, classification=shown, **changes,
    )  # fmt: skip


def selection(word="trial-2", **changes):
    figures = {
        "accuracy": Interval(value=0.9, low=0.85, high=0.92),
        "latency_ms": Interval(value=41.23, low=40.1, high=43),
    }
    fields = {
        "rule": "pareto", "why": f"{word}: it lies nearest to the ideal point", "remark": "; keeps latency_ms (50)",
        "measured": (f"openvino bf16 on {word}",), "limits": {"latency_ms": 50.0},
        "rows": (
            ChoiceRow(name=word, chosen=True, refused=False, figures=figures, kept={"latency_ms": True}, merit="0.2",
                      note=""),
            ChoiceRow(name="average of 2", chosen=False, refused=True, figures={"accuracy": Interval(value=0.95)},
                      kept={"latency_ms": False}, merit="", note=f"not measured: {word}"),
        ),
        "axes": ("val/dice", "latency_ms"), "directions": ("max", "min"),
        "points": (FrontPoint(name="trial 0", x=90.0, y=0.95, on_front=False, feasible=False),
                   FrontPoint(name="trial 1", x=3.0, y=0.7, on_front=True, feasible=True),
                   FrontPoint(name=word, x=41.2, y=0.9, on_front=False, feasible=True, champion=True)),
        "hypervolume": ((3.0, 0.1), (9.0, 0.4)),
    }  # fmt: skip
    return SelectionSummary(**(fields | changes))


class Page(HTMLParser):
    """Reads a page strictly: every element that opens closes, in order; keeps text and references."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.tags, self.references, self.handlers = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def _note(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        wanted = ("src", "href", "xlink:href", "action", "data", "srcset", "poster")
        self.references += [given or "" for name, given in attrs if name in wanted]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


CASES = {
    "segmentation": report(),
    "classification": classifier(),
    "multilabel": classifier("multilabel", ("effusion", "nodule", "cardiomegaly")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_well_formed_whole_and_loads_nothing(name):
    text = render(CASES[name])
    page = Page(text)
    assert {"script", "link", "iframe", "object", "embed", "form", "base"}.isdisjoint(page.tags)
    assert page.handlers == []
    assert page.references and all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert not re.search(r"@import|url\((?!#)", text)
    for words in ("trial-2: dice 0.874", "Not a medical device", "4 test cases of 4 patients", "used for no choice",
                  "medray tune seg.yaml", "812 MiB", "0.874 (0.851 to 0.893)", "default-src 'none'"):  # fmt: skip
        assert words in page.words or words in text


def test_a_segmentation_shows_its_cases_and_a_classifier_its_curves():
    seen = Page(render(report())).words
    assert "Dice tumour" in seen and "HD95 tumour (mm)" in seen and "case-2" in seen and "Classification" not in seen
    seen = Page(render(classifier())).words
    assert "Temperature 1.40" in seen and "0.120 before, 0.030 after" in seen and "Segmentations" not in seen


def test_several_labels_have_no_confusion_matrix():
    """Rows of true against columns of predicted mean nothing where an image has several labels."""
    one, several = (render(CASES[name]).count("<svg") for name in ("classification", "multilabel"))
    assert several == one - 1


def test_the_choice_is_shown_with_each_limit_kept_or_broken():
    without, text = render(report()), render(report(selection=selection()))
    seen = Page(text).words
    for words in ("Why this champion", "nearest to the ideal point", "latency_ms (limit 50)", "41.23 (40.1 to 43) kept",
                  "broken", "refused not measured", "openvino bf16 on trial-2"):  # fmt: skip
        assert words in seen
    assert text.count("<svg") == without.count("<svg") + 2 and "Why this champion" not in without


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>--><b>&amp; $x_{ $ %s {{ 7*7 }}"


@pytest.mark.parametrize("name", CASES)
def test_hostile_names_are_shown_and_do_nothing(name):
    base = CASES[name]
    classes = tuple(f"{HOSTILE}{i}" for i in range(len(base.data.classes)))
    result = base.classification
    if result is not None:
        result = replace(result, roc=tuple(replace(c, name=HOSTILE) for c in result.roc))
    given = replace(
        base,
        headline=HOSTILE, created=HOSTILE, intended_use=HOSTILE,
        data=summary(
            task=base.data.task, classes=classes, source=HOSTILE, sites={HOSTILE: 3},
            class_share=dict.fromkeys(classes, 0.5),
            findings=(("error", HOSTILE, HOSTILE),), examples=(picture(HOSTILE),), spacing=HOSTILE, modality=HOSTILE,
        ),
        study=study(
            name=HOSTILE, objective=HOSTILE, importance={HOSTILE: 1.0},
            time=(TimeRow(name=HOSTILE, seconds=1.0, share=1.0),),
            curves={f"final: {HOSTILE}": ((1.0, 0.5), (2.0, 0.6))},
            trials=(
                TrialRow(number=0, state="failed", params={HOSTILE: HOSTILE}, values={}, seconds=1.0, note=HOSTILE),
            ),
            candidates=(CandidateRow(name=HOSTILE, validation=Interval(value=0.5), chosen=True),),
        ),
        selection=selection(HOSTILE, rule=HOSTILE, axes=(HOSTILE, HOSTILE), limits={HOSTILE: 1.0}),
        gain=replace(base.gain, metric=HOSTILE), metrics={HOSTILE: Interval(value=0.5)},
        sites=(SiteRow(site=HOSTILE, cases=1, score=Interval(value=0.5)),),
        robustness=(RobustnessRow(corruption=HOSTILE, severity=2, score=Interval(value=0.5)),),
        classification=result, resources={HOSTILE: HOSTILE}, reproduce={HOSTILE: HOSTILE},
        segmentation=base.segmentation and segmentation(
            cases=(SegmentationCase(case=HOSTILE, patient=HOSTILE, site=HOSTILE, dice=(0.5,), hd95=(1.0,)),),
            overlays=(picture(HOSTILE),), per_class={HOSTILE: Interval(value=0.5)}, hd95_unit=HOSTILE,
        ),
    )  # fmt: skip
    page = Page(render(given))
    assert "script" not in page.tags and "b" not in page.tags and page.handlers == []
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert "{{ 7*7 }}" in page.words  # neither our template nor a formula of the plots takes a name for its own


def test_names_are_drawn_as_they_are():
    assert plots.plain("a $ b $ c") == r"a \$ b \$ c" and plots.plain("_left") == " _left"


def test_figures_that_do_not_exist_are_dashes_or_stand_without_an_interval():
    lost = Interval(value=NAN)
    given = report(
        gain=replace(report().gain, default=lost, champion=lost, difference=lost),
        metrics={"hd95": lost, "dice": Interval(value=0.5)}, robustness=(),
        segmentation=segmentation(
            cases=(SegmentationCase(case="c", patient="p", site="", dice=(NAN,), hd95=(NAN,)),),
            per_class={"tumour": lost},
        ),
        study=study(trials=(trial(0, "completed", NAN),), curves={"final: default": ((1.0, NAN),)}),
    )  # fmt: skip
    words = Page(render(given)).words
    assert "nan" not in words.lower() and "–" in words


def test_a_study_without_search_has_no_leaderboard():
    words = Page(render(report(study=study(trials=(), curves={}, importance={}), robustness=(), sites=()))).words
    assert "Leaderboard" not in words and "Robustness" not in words and "By site" not in words
    assert "hyper-parameters" not in words and "Candidates for the champion" in words


def test_measured_on_the_cases_that_chose_is_called_optimistic():
    given = report(gain=replace(report().gain, measured_on="validation"))
    assert "Optimistic" in Page(render(given)).words and "Optimistic" not in Page(render(report())).words


def test_candidates_stand_against_the_best_single_network():
    rows = (
        CandidateRow(name="default", validation=Interval(value=0.8), chosen=False, latency_ms=3.21),
        CandidateRow(
            name="stack of 2", validation=Interval(value=0.9), chosen=True, latency_ms=7.65,
            difference=Interval(value=0.1, low=0.0123, high=0.2),
        ),
    )  # fmt: skip
    rivalry = Rivalry(
        single="trial-7", value=Interval(value=0.8), latency_ms=(3.21, 7.65),
        difference=Interval(value=0.0456, low=-0.01, high=0.09),
    )  # fmt: skip
    shown = render(report(study=study(candidates=rows, rivalry=rivalry)))
    assert "0.1000 (0.0123 to 0.2000)" in shown and "0.0456 (-0.0100 to 0.0900)" in shown
    assert ("trial-7" in shown and "3.2" in shown and "7.7" in shown) or "7.6" in shown
    assert "over the best single network, trial-7" not in render(report())


def test_what_was_found_elsewhere_is_shown_and_why_if_nothing_was():
    warm = (WarmRow(trial=1, origin=HOSTILE, distance=0.42, there=0.031, here=None),)
    shown = render(report(study=study(warm=warm)))
    assert "0.42" in shown and "0.0310" in shown and HOSTILE not in shown
    assert "There was no search." in render(report(study=study(warm_note="There was no search.")))


def test_where_the_time_went_is_shown_with_its_share():
    shown = render(report())
    (table,) = [part for part in shown.split("<table>") if "final fit" in part]
    assert re.findall(r'<td>(.+?)</td><td class="n">(.+?)</td><td class="n">(.+?)</td>', table) == [
        ("search: neither", "40 s", "3.4 %"), ("final fit", "11 min 40 s", "59.0 %"),
    ]  # fmt: skip


@pytest.mark.parametrize(("direction", "order"), [("max", ["2", "0", "3", "1"]), ("min", ["0", "2", "3", "1"])])
def test_the_leaderboard_begins_with_the_best_completed_trial(direction, order):
    text = render(report(study=study(direction=direction))).split("Leaderboard")[1].split("</table>")[0]
    assert re.findall(r'<tr><td class="n">(\d+)</td>', text) == order


def test_a_trial_without_a_number_stands_behind_those_with_one():
    trials = (trial(0, "completed", NAN), trial(1, "completed", 0.2))
    text = render(report(study=study(trials=trials))).split("Leaderboard")[1]
    assert re.findall(r'<tr><td class="n">(\d+)</td>', text)[:2] == ["1", "0"]


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("the former report", encoding="utf-8")
    with pytest.raises(AttributeError):
        write_report(replace(report(), gain=None), path)
    assert path.read_text(encoding="utf-8") == "the former report"
    assert write_report(report(), path) == path and path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_may_be_grey():
    grey = Picture(pixels=np.zeros((8, 8), np.uint8), caption="grey")
    assert "data:image/png" in render(report(data=summary(examples=(grey,))))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (1025, "17 min 5 s"), (7380, "2 h 3 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers():
    assert figure(0.12345) == "0.123" and figure(NAN) == "–" and figure(float("inf")) == "–"
    assert interval(Interval(value=0.5, low=0.25, high=0.75), 2) == "0.50 (0.25 to 0.75)"
    assert interval(Interval(value=0.5)) == "0.500"
    assert value(0.00123456) == "0.001235" and value("unet") == "unet" and value(True) == "True"


def limits(direction, values, monkeypatch):
    """The vertical limits that learning_curves() sets."""
    kept = {}
    monkeypatch.setattr(plots, "svg", lambda shape: kept.update(limits=shape.axes[0].get_ylim()) or "")
    points = tuple((float(i), v) for i, v in enumerate(values))
    plots.learning_curves({"trial 0": points}, "val/metric", direction)
    return kept["limits"]


def test_learning_curves_leave_out_the_first_steps_and_never_the_best(monkeypatch):
    rising = [0.0, 0.8, 0.85, 0.86, 0.87, 0.88, 0.885, 0.89, 0.892, 0.894, 0.895, 0.896]
    low, high = limits("max", rising, monkeypatch)
    assert low > 0.5 and high > max(rising)
    falling = [9.0, *(1.0 - v for v in rising[1:])]
    low, high = limits("min", falling, monkeypatch)
    assert high < 5.0 and low < min(falling)


def test_a_searched_network_is_shown_with_its_cells_and_long_names_are_cut():
    edges = [[[0, "sep3"], [1, "skip"]], [[1, "conv3"], [2, "max3"]]]
    genotype = Genotype.model_validate({"kind": "segmentation", "cells": {"down": edges, "up": edges}})
    found = Architecture(strategy="darts", steps=120, seconds=61.0, genotype=genotype, chosen=True)
    row = TrialRow(number=0, state="completed", params={"model.name": genotype.name}, values={}, seconds=1.0)
    page = render(report(architecture=found, study=study(trials=(row,))))
    assert "The champion has these cells." in page and "120 steps, 1 min 1 s" in page
    assert page.count(">conv3<") == 2 and page.count(">up cell<") == 1
    assert genotype.name not in page and genotype.name[:40] in page
    assert "The searched network" not in render(report())
