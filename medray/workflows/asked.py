"""What a study was asked for, and its file: ``study.yaml``, which ``--resume`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medray.config.compose import compose, merge
from medray.config.schema import Experiment, StudyConfig
from medray.config.selection import SelectConfig
from medray.errors import ConfigError, StudyError
from medray.search.space import Space
from medray.workflows import architecture
from medray.workflows.storage import RunStore, place_of

__all__ = ["Asked", "new", "resumed", "save"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, resolved; the same in every sitting of a study."""

    source: str
    explicit: dict[str, Any]
    study: StudyConfig
    space: dict[str, Any]
    command: str


def new(path: Path | None, overrides: Sequence[str], runs: Path, storage: str | None = None) -> tuple[Path, Asked]:
    """The folder of a new study, made and with its ``study.yaml``, and what was asked for.

    Raises:
        ConfigError: a key, value or space that is refused.
    """
    composed = compose(path, overrides)
    Space.parse(composed.space)
    architecture.check(composed.study.nas, composed.space)
    if (composed.explicit.get("privacy") or {}).get("epsilon") is not None or any(
        key.partition(".")[0] == "privacy" for key in composed.space
    ):
        raise ConfigError(
            "a study under privacy.epsilon would look at the private cases in every trial, and each look would have to "
            "be paid for. Search on public data without it, then: medray train EXPERIMENT privacy.epsilon=..."
        )
    source = str(composed.explicit.get("data") or Experiment().data)
    command = " ".join(["medray tune", *([str(path)] if path else []), *overrides])
    asked = Asked(
        source=source, explicit=composed.explicit, study=composed.study, space=composed.space, command=command
    )
    directory = runs / asked.study.name
    number = 2
    while _is_taken(directory, storage):  # what lies there is somebody's work
        directory = runs / f"{asked.study.name}-{number}"
        number += 1
    directory.mkdir(parents=True, exist_ok=True)
    save(directory, asked)
    return directory, asked


def _is_taken(directory: Path, storage: str | None) -> bool:
    if directory.exists() and any(directory.iterdir()):
        return True
    place = place_of(directory, storage)
    return place is not None and RunStore.at(place).holds_run()


def save(directory: Path, asked: Asked) -> None:
    """Write ``study.yaml``."""
    text = yaml.safe_dump(
        {
            "command": asked.command,
            "source": asked.source,
            "explicit": asked.explicit,
            "study": asked.study.model_dump(mode="json"),
            "space": asked.space,
        },
        sort_keys=False,
        allow_unicode=True,
    )
    partial = directory / "study.yaml.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(directory / "study.yaml")


def resumed(directory: Path, overrides: Sequence[str]) -> tuple[Path, Asked]:
    """What a study was asked for, from its folder, and under what may change.

    Raises:
        StudyError: there is none, or its file is damaged.
        ConfigError: something else than ``study.trials``, ``study.budget`` and ``study.select`` was to change.
    """
    try:
        stored = yaml.safe_load((directory / "study.yaml").read_text(encoding="utf-8"))
        study = dict(stored["study"])
        asked = Asked(
            source=str(stored["source"]),
            explicit=dict(stored["explicit"]),
            study=StudyConfig.model_validate(study),
            space=dict(stored["space"]),
            command=str(stored["command"]),
        )
    except OSError as error:
        raise StudyError(
            f"{directory}: no study to resume ({error.strerror}). Give the folder that holds study.yaml"
        ) from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{directory / 'study.yaml'} is damaged: {error}. Begin a new study") from None
    if not overrides:
        return directory, asked
    composed = compose(None, overrides)
    changed: dict[str, Any] = {name: getattr(composed.study, name) for name in composed.study.model_fields_set}
    if composed.explicit or composed.space or set(changed) - {"trials", "budget", "select"}:
        raise ConfigError(
            "a resumed study may change study.trials, study.budget and study.select, nothing else: trials would not be "
            "comparable. Begin a new study for other settings"
        )
    if "select" in changed:
        tree = merge(
            asked.study.select.model_dump(exclude_unset=True), composed.study.select.model_dump(exclude_unset=True)
        )
        try:
            changed["select"] = SelectConfig.model_validate(tree)
        except ValueError as error:
            raise ConfigError(f"study.select does not fit what the study was begun with: {error}") from None
    asked = Asked(
        source=asked.source,
        explicit=asked.explicit,
        study=asked.study.model_copy(update=changed),
        space=asked.space,
        command=asked.command,
    )
    save(directory, asked)
    _set_aside(directory, refit=bool(set(changed) - {"select"}))
    return directory, asked


def _set_aside(directory: Path, *, refit: bool) -> None:
    """Keep what an ended study came to under a number, so that it can go on.

    Args:
        directory: of the study.
        refit: with more time or trials the finalists are trained anew; where only the rule changed they stand.
    """
    if not (directory / "result.json").exists():
        return
    number = 1
    while (directory / f"result-{number}.json").exists():
        number += 1
    finalists = (("final", ""),) if refit else ()
    for stem, suffix in (*finalists, ("report", ".html"), ("bundle", ""), ("result", ".json")):
        path = directory / f"{stem}{suffix}"
        if path.exists():
            path.rename(directory / f"{stem}-{number}{suffix}")
