"""``medray site``: what a site decides and keeps for itself: its ledger of spent privacy, its audit log."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medray.cli.show import say, table

if TYPE_CHECKING:
    from medray.privacy.ledger import Limits

app = typer.Typer(no_args_is_help=True, help="A site's own decisions: its privacy budget, and what it was asked.")

_FRAME = ("n", "previous", "time", "event", "kind")
LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="The site's ledger file.")]
Epsilon = Annotated[float, typer.Option(help="Of everything that the ledger will ever hold.")]
PerRun = Annotated[float | None, typer.Option(help="Most epsilon of a single run [default: what is left]")]
PerYear = Annotated[float | None, typer.Option(help="Most epsilon of a year [default: what is left]")]


@app.command("open")
def open_(
    ledger: LedgerFile,
    epsilon: Epsilon,
    delta: Annotated[float, typer.Option(help="At which all epsilons of the ledger are stated.")] = 1e-5,
    per_run: PerRun = None,
    per_year: PerYear = None,
) -> None:
    """Begin a ledger, once, on the site's own disk.

    Example: medray site open /srv/medray/ledger.jsonl --epsilon 10 --per-run 3
    """
    from medray.privacy.ledger import Ledger, Limits

    Ledger.create(ledger, Limits(epsilon=epsilon, delta=delta, per_run=per_run, per_year=per_year))
    say(f"{ledger}: opened with epsilon {epsilon:g} at delta {delta:g}")


@app.command()
def budget(ledger: LedgerFile) -> None:
    """Show what was spent, by which run, and what is left."""
    from medray.privacy.ledger import Ledger

    book = Ledger(ledger)
    limits, entries, spent = book.limits, book.entries(), book.spent()
    if entries:
        table(("run", "when", "data", "steps", "state"), [_row(entry) for entry in entries])
        say()
    say(f"spent: epsilon {spent.epsilon:.4g} of {limits.epsilon:g} at delta {limits.delta:g} (by {spent.accountant})")
    if limits.per_year is not None:
        say(f"this year: epsilon {book.spent(this_year=True).epsilon:.4g} of {limits.per_year:g}")
    if limits.per_run is not None:
        say(f"a run may spend at most {limits.per_run:g}")
    say(f"left: {book.remaining():.4g}")


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The site's audit log, or its ledger.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Check alone, print no lines.")] = False,
) -> None:
    """Print what a site was asked and did, and check that no line was changed, removed or put in; 1 where one was.

    Example: medray site audit audit.jsonl
    """
    from medray.errors import PrivacyError
    from medray.privacy.chain import Chain
    from medray.privacy.ledger import Ledger

    try:
        lines = Chain(file, "an audit log or ledger").read()
        if lines.records and lines.records[0].get("kind") == "open" and (wrong := Ledger(file).verify()):
            raise PrivacyError(wrong)
    except PrivacyError as error:
        say(str(error))
        raise typer.Exit(1) from None
    for record in () if quiet else lines.records:
        about = [f"{key}={value}" for key, value in record.items() if key not in _FRAME and value is not None]
        say(f"{record.get('time')}  {record.get('event') or record.get('kind')}  {' '.join(about)}")
    say(f"{file}: whole, {len(lines.records)} lines; head {lines.head}")


@app.command("limits")
def limits_(ledger: LedgerFile, epsilon: Epsilon, per_run: PerRun = None, per_year: PerYear = None) -> None:
    """Change what the site allows; what was spent stays, and so does the delta."""
    from medray.privacy.ledger import Ledger, Limits

    book = Ledger(ledger)
    new: Limits = Limits(epsilon=epsilon, delta=book.limits.delta, per_run=per_run, per_year=per_year)
    book.set_limits(new, by=getpass.getuser())
    say(f"{ledger}: epsilon {epsilon:g}; left: {book.remaining():.4g}")


@app.command()
def renew(ledger: LedgerFile) -> None:
    """Open a new year, for --per-year; the whole ledger's limit stays."""
    from medray.privacy.ledger import Ledger

    book = Ledger(ledger)
    book.renew(by=getpass.getuser())
    say(f"{ledger}: a new year is open; left: {book.remaining():.4g}")


def _row(entry: object) -> tuple[str, ...]:
    from medray.privacy.ledger import Entry

    assert isinstance(entry, Entry)
    steps = " + ".join(str(n) for _, _, n in entry.counted)
    state = "settled" if entry.settled is not None else "not settled: counts in full"
    return entry.reservation.run, entry.when, entry.data, steps, state
