"""What a site keeps of each run, so that runs at once, or one after the other by the same recipe, don't meet.

``runs/<name>/`` in the site's folder, the name a hash of recipe and run, has the state of the run's last two rounds
(``state-0.pt``, ``state-1.pt``) and, under secure aggregation, what ``sealing`` keeps. Of the runs that were asked for
last, :data:`RUNS` are kept; one that was forgotten and comes back begins anew at this site.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medray.engines.flower.parcel import Parcel
from medray.errors import FederationError
from medray.train import checkpoint

__all__ = ["RUNS", "forget_old", "keep_state", "kept_state", "kept_states", "place_of", "run_folder"]

FOLDER = "runs"
RUNS = 8
"""Whose folders are kept."""


def place_of(parcel: Parcel) -> tuple[str, int]:
    """Run and round, from 0, that a question is of.

    Raises:
        FederationError: it names none.
    """
    run, number = parcel.text.get("run"), parcel.text.get("round")
    if not isinstance(run, str) or re.fullmatch("[0-9a-f]{32}", run) is None:
        raise FederationError("a question names its run, in 32 hexadecimal digits. Do both sides run the same version?")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise FederationError(f"a question names its round, from 0, not {number!r}")
    return run, number


def run_folder(directory: Path, recipe: str, run: str) -> Path:
    """Where a site keeps a run's things.

    Args:
        directory: of the site.
        recipe: content hash of the run's experiment: a server that names another one's run gets none of its state.
        run: as the server names it.
    """
    name = hashlib.sha256(f"{recipe}/{run}".encode()).hexdigest()[:32]
    return directory / FOLDER / name


def kept_states(folder: Path) -> list[dict[str, Any]]:
    """A run's states, of its last two rounds at most, in no order."""
    found = [checkpoint.load(folder / f"state-{half}.pt") for half in (0, 1)]
    return [state for state in found if state is not None]


def kept_state(folder: Path, *, before: int | None = None) -> dict[str, Any]:
    """A run's newest state: of a round below ``before`` (from 0), or of all; nothing where there is none."""
    fitting = [state for state in kept_states(folder) if before is None or state["round"] < before]
    return max(fitting, key=lambda state: int(state["round"]), default={})


def keep_state(folder: Path, state: dict[str, Any], *, forgets: Callable[[str], None] = lambda _: None) -> None:
    """Write the state of ``state["round"]`` in place of that of two rounds before, whole or not at all.

    Args:
        folder: of the run.
        state: tensors and plain containers.
        forgets: hears of a run that is forgotten for it.
    """
    checkpoint.save(folder / f"state-{int(state['round']) % 2}.pt", state)
    forget_old(folder, forgets)


def forget_old(newest: Path, forgets: Callable[[str], None] = lambda _: None) -> None:
    """Forget the runs that were asked for longest ago, but for :data:`RUNS`.

    Args:
        newest: folder of the run that is asked for now.
        forgets: hears of each that is forgotten.
    """
    newest.touch()  # a file that is written anew in it doesn't say so
    others = [folder for folder in newest.parent.iterdir() if folder != newest and folder.is_dir()]
    for old in sorted(others, key=lambda folder: folder.stat().st_mtime)[: -(RUNS - 1)]:
        forgets(f"forgets run {old.name}: {RUNS} others were asked for since")
        shutil.rmtree(old, ignore_errors=True)
