"""``medray models``: the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from medray.cli.show import say, table


def models(
    task: Annotated[str | None, typer.Option(help="Only those that can do it.")] = None,
    ndim: Annotated[int | None, typer.Option(min=2, max=3, help="Only 2-D or 3-D ones.")] = None,
    grep: Annotated[str, typer.Option(help="Only names that contain this.")] = "",
) -> None:
    """List the networks: name, what they are for, 2-D or 3-D, parameters, tier."""
    from medray.models.catalogue import CATALOGUE, count_parameters, names

    chosen = [name for name in names(kind=task, ndim=ndim) if grep.lower() in name.lower()]
    rows = []
    for name in chosen:
        spec = CATALOGUE[name]
        rows.append(
            (
                name,
                ", ".join(spec.kinds),
                ", ".join(f"{n}-D" for n in spec.ndims),
                " / ".join(f"{count_parameters(name, n) / 1e6:.1f} M" for n in spec.ndims),
                spec.tier,
                spec.description,
            )
        )
    table(("name", "task", "dimensions", "parameters", "tier", "what it is"), rows)
    say(f"\n{len(rows)} of {len(CATALOGUE)} networks; choose one with model.name=NAME")
