"""``medray studies``: what studies came to, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import duration, interval, progress, say, table

app = typer.Typer(no_args_is_help=True, help="Put studies side by side.")


@app.callback()
def _studies() -> None:
    """Put studies side by side."""  # without a callback the one verb would take the place of the group


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="An ended study, such as runs/seg.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
    rows: Annotated[int, typer.Option(min=1, help="Of each leaderboard.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare two studies: settings, leaderboards, champions; paired, with intervals, where the cases are the same.

    Example: medray studies compare runs/seg runs/seg-2
    """
    from medray.workflows.comparison import compare_studies

    with progress("comparing") as show:
        found = compare_studies(one, other, progress=show)
    first, second = found.studies
    if as_json:
        plain = {
            "studies": [{"directory": str(s.directory), "champion": s.champion, "headline": s.headline,
                         s.metric: _numbers(s.value), "leaderboard": list(s.leaderboard)} for s in found.studies],
            "difference": {name: _numbers(value) for name, value in (found.difference or {}).items()} or None,
            "reason": found.reason,
        }  # fmt: skip
        say(json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False))
        return
    table(
        ("", str(one), str(other)),
        [
            *((name, first.settings[name], second.settings[name]) for name in first.settings),
            ("time", duration(first.seconds), duration(second.seconds)),
            ("champion", first.champion, second.champion),
            ("result", *(f"{s.metric} {interval(*s.value)}" for s in found.studies)),
            *([("chosen", first.why, second.why)] if first.why or second.why else []),
        ],
    )
    for study in found.studies:
        say(f"\n{study.directory}, the best of {len(study.leaderboard)} trials")
        if study.leaderboard:
            table(tuple(study.leaderboard[0]), [tuple(row.values()) for row in study.leaderboard[:rows]])
    say(f"\n{one} minus {other}: {found.reason}")
    if found.difference is not None:
        table(("figure", "difference"), [(name, interval(*value)) for name, value in found.difference.items()])


def _numbers(found: tuple[float, ...]) -> list[float | None]:
    return [value if value == value else None for value in found]
