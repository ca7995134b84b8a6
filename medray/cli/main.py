"""The command line: parse, call a workflow, print. Vendors and workflows are imported inside the verbs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from medray import __version__
from medray.cli import cache, check, data, doctor, evaluate, models, plan, predict, submit, train, tune
from medray.errors import MedrayError

app = typer.Typer(
    name="medray",
    help="From a folder of medical images to a tuned, reported and packaged model. Research use only.",
    epilog="First steps: medray doctor, then medray tune search_spaces/demo.yaml",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check")(check.check)
app.add_typer(data.app, name="data")
app.command("plan")(plan.plan)
app.command("models")(models.models)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("submit")(submit.submit)
app.command("cache")(cache.cache)
app.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"medray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Options of every verb."""


def main() -> None:
    """Run the command line; exits with 0, 1 (a check found something), 2 (an error), 130 (Ctrl-C)."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="medray")
    except MedrayError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; the interpreter would complain when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
