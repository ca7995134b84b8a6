"""The command line: parse, call a workflow, print. Vendors and workflows are imported inside the verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from medray import __version__
from medray.cli import (
    bench,
    cache,
    check,
    compress,
    data,
    doctor,
    evaluate,
    explain,
    federate,
    federate_network,
    keys,
    models,
    plan,
    predict,
    runs,
    serve,
    site,
    studies,
    submit,
    train,
    tune,
)
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
app.command("serve")(serve.serve)
app.add_typer(keys.app, name="keys")
app.command("evaluate")(evaluate.evaluate)
federate_network.add_to(federate.app)
app.add_typer(federate.app, name="federate")
app.add_typer(site.app, name="site")
app.command("explain")(explain.explain)
app.command("compress")(compress.compress)
app.command("bench")(bench.bench)
app.command("submit")(submit.submit)
app.command("runs")(runs.runs)
app.add_typer(studies.app, name="studies")
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
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option("--log-format", help="json: an object a line on stderr, results on stdout; may stand anywhere."),
    ] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option("--log-level", help="Least level shown; json: info, text: warning; may stand anywhere."),
    ] = "warning",
) -> None:
    """Options of every verb."""


def main() -> None:
    """Run the command line; exits with 0, 1 (a check found something), 2 (an error), 130 (Ctrl-C)."""
    from medray import logs

    arguments, debug, form, level = _everywhere(sys.argv[1:])
    for name, value, known in (
        ("--log-format", form, ("text", "json")),
        ("--log-level", level or "info", tuple(logs.LEVELS)),
    ):
        if value not in known:
            print(f"error: {name} {value}: choose from {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
    with logs.configured("json" if form == "json" else "text", level):
        _run(arguments, debug)


def _everywhere(arguments: Sequence[str]) -> tuple[list[str], bool, str, str | None]:
    """The arguments without the options that may stand anywhere; then those options: debug, format, level."""
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--log-format", "--log-level"):
            found[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    form = found.get("--log-format", os.environ.get("MEDRAY_LOG_FORMAT") or "text")
    level = found.get("--log-level", os.environ.get("MEDRAY_LOG_LEVEL") or None)
    return [word for word in rest if word != "--debug"], "--debug" in rest, form, level


def _run(arguments: list[str], debug: bool) -> None:
    from medray import logs

    try:
        app(args=arguments, prog_name="medray")
    except MedrayError as error:
        if debug:
            raise
        if logs.is_json():
            logs.event("error", level="error", text=str(error), error=type(error).__name__)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has what it wanted; the interpreter would complain when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug or not logs.is_json():
            raise
        logs.event("crash", level="critical", text=str(error), error=type(error).__name__, exc_info=error)
        sys.exit(1)


if __name__ == "__main__":
    main()
