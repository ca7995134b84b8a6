"""``medray.AutoML``: a study from Python, for notebooks and scripts; the same code as ``medray tune`` underneath.

study = medray.AutoML("scans/", budget="30min").optimize()
study.leaderboard()          # a pandas.DataFrame
study.champion()             # its name and figures with 95 % intervals
study.predict("new_scans/")  # a pandas.DataFrame, a row for each image
study.report()               # report.html, shown in a notebook
"""

from __future__ import annotations

import hashlib
import html
import json
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from medray.config.spaces import shipped
from medray.errors import ConfigError, DataError, StudyError
from medray.workflows.events import Observer, StudyEvent
from medray.workflows.spaces import space_for

if TYPE_CHECKING:
    import pandas as pd

    from medray.bundle.engines import RuntimeChoice
    from medray.bundle.read import Bundle

__all__ = ["AutoML", "Champion", "Report"]

_SHOWN = ("stage", "trial-completed", "trial-pruned", "trial-failed", "note", "done")
_FILES = ("image", "mask", "valid")
"""Columns of a table whose cells are files; ``image_*`` too."""


@dataclass(frozen=True, kw_only=True)
class Champion:
    """What a study came to.

    Attributes:
        name: ``default``, ``trial-7``, or the ensemble's.
        headline: one sentence, with the gain over the plan's default.
        metric: what it was chosen by.
        metrics: (value, low, high) of each metric, 95 % intervals; None where there is no figure.
        measured_on: test cases, or validation cases (the figures are optimistic then).
        cases: how many.
        directory: of its bundle.
    """

    name: str
    headline: str
    metric: str
    metrics: Mapping[str, tuple[float | None, float | None, float | None]]
    measured_on: str
    cases: int
    directory: Path

    @property
    def bundle(self) -> Bundle:
        """The bundle, opened: predictors, pre- and post-processing."""
        from medray.bundle.read import Bundle

        return Bundle.open(self.directory)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_figure(value)}</td><td>{_figure(low)} to {_figure(high)}</td></tr>"
            for name, (value, low, high) in self.metrics.items()
        )
        head = "<tr><th>metric</th><th>value</th><th>95 % interval</th></tr>"
        return f"<p>{html.escape(self.headline)}</p><table>{head}{rows}</table>"


@dataclass(frozen=True, kw_only=True)
class Report:
    """``report.html``: one file that needs nothing else."""

    path: Path

    def open(self) -> None:
        """Show it in the browser."""
        webbrowser.open(self.path.absolute().as_uri())

    def _repr_html_(self) -> str:
        inside = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{inside}" sandbox="allow-scripts" style="width:100%;height:48em;border:0"></iframe>'


class AutoML:
    """A study: from images to a tuned, checked, explained model within a wall-clock budget.

    Args:
        data: a folder, table, ``.npz``, ``dataset.json`` or ``phantom://NAME``; or a pandas.DataFrame with the columns
            of such a table (``image`` and ``label`` or ``mask``; ``patient``, ``site``, ``split``), whose files are
            relative to the working directory.
        task: classification, multilabel, segmentation or ordinal; None finds out.
        metric: what is searched for, such as ``auc``, ``balanced_accuracy`` or ``dice``; a mapping of several to their
            directions makes a trade-off: ``{"val/dice": "max", "latency_ms": "min"}``. None: the task's own.
        trials: at most so many.
        budget: of wall clock for everything, in seconds or as ``"30min"``. None: the space's own.
        space: the name of a space that comes with medray (``seg``), a YAML file, or a mapping of fields to ranges
            (``{"optim.lr": {"float": [1e-4, 1e-2], "log": True}}``). None: the one that suits the data.
        name: of the study's folder. None: the space's own.
        overrides: of any other field, as on the command line: ``["train.precision=fp32"]``.
        runs: folder in which the study's folder is made.
        address: of a Ray cluster; None starts Ray on this machine.
        storage: ``s3://bucket/prefix``, below which the study is kept too.

    Raises:
        ConfigError: a value that no study takes; says what one takes. Most are found by :meth:`optimize` only.
    """

    def __init__(
        self,
        data: str | Path | pd.DataFrame,
        *,
        task: str | None = None,
        metric: str | Mapping[str, Literal["max", "min"]] | None = None,
        trials: int | None = None,
        budget: float | str | None = None,
        space: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
        name: str | None = None,
        overrides: Sequence[str] = (),
        runs: str | Path = "runs",
        address: str | None = None,
        storage: str | None = None,
    ) -> None:
        self._runs, self._address, self._storage = Path(runs).absolute(), address, storage
        source, self._table = _source(data, self._runs)
        self._space: Path | None = None
        self._directory: Path | None = None
        asked: dict[str, Any] = {"data": source, "task.kind": task, "study.name": name}
        asked |= {"study.trials": trials, "study.budget": budget}
        self._overrides = [f"{key}={value}" for key, value in asked.items() if value is not None]
        if metric is not None:
            self._overrides.append(f"study.objectives={_flow(_objectives(metric))}")
        if isinstance(space, Mapping):
            self._overrides += [f"space.{key}={_flow(entry)}" for key, entry in space.items()]
        elif space is not None:
            self._space = Path(space) if Path(space).is_file() else shipped(str(space))
        self._suits = space is None
        self._overrides += overrides

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """A study that was begun before, here or by ``medray tune``; :meth:`optimize` goes on with it.

        Raises:
            StudyError: the folder holds none.
        """
        from medray.workflows.asked import resumed

        folder, asked = resumed(Path(directory).resolve(), ())
        study = cls(asked.source, runs=folder.parent)
        study._directory = folder
        return study

    @property
    def directory(self) -> Path:
        """The study's folder.

        Raises:
            StudyError: it has not been begun.
        """
        if self._directory is None:
            raise StudyError("this study has not begun. Call optimize(), or AutoML.load() for one that has")
        return self._directory

    def optimize(self, *, observer: Observer | None = None) -> Self:
        """Search, fit the champion, report and bundle, within the budget; a study that was cut off goes on.

        Args:
            observer: hears of all that happens; None prints a line for each stage and each ended trial.

        Returns:
            Itself.

        Raises:
            ConfigError, DataError, StudyError, StorageError: each says what to do.
        """
        from medray.workflows.asked import new
        from medray.workflows.study import tune

        if self._directory is None:
            if self._table is not None:
                _keep(*self._table)
            if self._suits and self._space is None:
                self._space = space_for(self._overrides)
            self._directory, _ = new(self._space, self._overrides, self._runs.resolve(), self._storage)
        tune(
            None,
            resume=self._directory,
            address=self._address,
            storage=self._storage,
            observer=_narrate if observer is None else observer,
        )
        return self

    def leaderboard(self) -> pd.DataFrame:
        """The trials, best first: state, the metric, seconds, and the value of each field that was searched.

        Raises:
            StudyError: the study has not ended.
        """
        import pandas as pd

        self._result()
        return pd.read_csv(self.directory / "leaderboard.csv").set_index("trial")

    def champion(self) -> Champion:
        """The model that won.

        Raises:
            StudyError: the study has not ended.
        """
        result = self._result()
        return Champion(
            name=result["champion"],
            headline=result["headline"],
            metric=result["metric"],
            metrics={name: tuple(figures) for name, figures in result["metrics"].items()},
            measured_on=result["measured_on"],
            cases=result["cases"],
            directory=self.directory / "bundle",
        )

    def report(self) -> Report:
        """The report; in a notebook it shows itself.

        Raises:
            StudyError: the study has not ended.
        """
        self._result()
        return Report(path=self.directory / "report.html")

    def predict(
        self,
        inputs: str | Path | Sequence[str | Path],
        out: str | Path | None = None,
        *,
        runtime: RuntimeChoice = "torch",
        overlays: bool = False,
    ) -> pd.DataFrame:
        """Answer images by the champion.

        Args:
            inputs: files, folders or globs.
            out: folder of the masks, the table and ``summary.json``; None: a new one in the study's folder.
            runtime: torch, onnx, openvino, tensorrt, or auto for the fastest here.
            overlays: beside each PNG mask of a picture, the picture with the mask drawn on it.

        Returns:
            A row for each image: ``image``, ``prediction`` (class names), ``p_CLASS`` calibrated (classification) or
            ``output``, the mask's file (segmentation), and ``error``, which is empty where there is an answer.

        Raises:
            StudyError: the study has not ended.
            DataError: there is no image at all.
        """
        import pandas as pd

        from medray.workflows.prediction import predict_files

        self._result()
        several = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
        folder = Path(out) if out is not None else _fresh(self.directory / "predictions")
        summary = predict_files(self.directory / "bundle", several, folder, runtime, overlays=overlays)
        rows: list[dict[str, Any]] = []
        for answer in summary.answers:
            row: dict[str, Any] = {"image": answer.image, "prediction": ";".join(answer.classes)}
            if answer.probabilities is not None:
                row |= {f"p_{name}": value for name, value in answer.probabilities.items()}
            elif answer.output is not None:
                row["output"] = str(folder / answer.output)
            rows.append(row | {"error": answer.error or ""})
        return pd.DataFrame(rows)

    def _result(self) -> dict[str, Any]:
        path = self.directory / "result.json"
        if not path.is_file():
            raise StudyError(f"{self.directory.name} has not ended; optimize() goes on with it")
        return json.loads(path.read_text(encoding="utf-8"))

    def _repr_html_(self) -> str:
        if self._directory is None or not (self._directory / "result.json").is_file():
            state = "not begun" if self._directory is None else f"{self._directory.name}: not ended"
            return f"<p>medray study ({html.escape(state)}); optimize() goes on</p>"
        board = self.leaderboard().head(10).to_html(border=0, na_rep="")
        return f"<h4>{html.escape(self.directory.name)}</h4>{self.champion()._repr_html_()}{board}"


def _narrate(event: StudyEvent) -> None:
    if event.kind not in _SHOWN:
        return
    measured = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items() if name.startswith("val/"))
    about = "" if event.trial is None else f"trial {event.trial} {event.kind.removeprefix('trial-')}: "
    text = " ".join(part for part in (event.text, measured) if part)
    print(f"{event.elapsed:6.0f} s  {about}{text}", flush=True)


def _objectives(metric: str | Mapping[str, Literal["max", "min"]]) -> dict[str, str]:
    if not isinstance(metric, str):
        return dict(metric)
    from medray.tasks.catalogue import direction_of

    name = metric.removeprefix("val/")
    return {f"val/{name}": direction_of(name)}


def _source(data: str | Path | pd.DataFrame, runs: Path) -> tuple[str, tuple[Path, str] | None]:
    """The data as a study names them; of a DataFrame also the table that it becomes, below ``runs`` by its content."""
    if isinstance(data, (str, Path)):
        return str(data), None
    if not hasattr(data, "to_csv"):
        raise DataError(f"data is a {type(data).__name__}; give a path, phantom://NAME, or a pandas.DataFrame")
    files = [name for name in data.columns if str(name) in _FILES or str(name).startswith("image_")]
    if not files:
        raise DataError(
            f"data: the DataFrame has no column 'image'. It has: {', '.join(map(str, data.columns))}. Rename the one "
            "that names the files"
        )
    table = data.assign(**{str(name): [_absolute(cell) for cell in data[name]] for name in files})
    text = table.to_csv(index=False)
    path = runs / ".tables" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"
    return str(path), (path, text)


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # its columns may name patients
    path.write_text(text, encoding="utf-8")


def _absolute(cell: Any) -> Any:
    is_file = isinstance(cell, (str, Path)) and str(cell) and "://" not in str(cell)
    return str(Path(cell).expanduser().absolute()) if is_file else cell


def _fresh(folder: Path) -> Path:
    """The folder, or the first numbered one beside it that is not there: what was answered before is somebody's."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def _flow(value: Any) -> str:
    """A value as an override's text: ``{float: [0.1, 1.0], log: true}``."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if hasattr(value, "item") and not isinstance(value, (int, float)):
        value = value.item()  # NumPy's
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(float(value)) if isinstance(value, float) else repr(int(value))
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    raise ConfigError(f"{value!r} is a {type(value).__name__}, and a search space holds numbers, texts and lists")


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
