"""What the README says exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from medray.cli.arguments import split_arguments
from medray.cli.main import app
from medray.config.compose import compose
from medray.config.spaces import shipped

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)]


def commands(program: str) -> list[list[str]]:
    return [words for words in (shlex.split(line, comments=True) for line in LINES) if words and words[0] == program]


@pytest.mark.parametrize("words", commands("medray"), ids=" ".join)
def test_medray_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    group = get_command(app)
    verb, arguments = words[1], words[2:]
    command = group.commands[verb]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        assert arguments[0] in command.commands
        return
    context = command.make_context(verb, list(arguments), resilient_parsing=False)
    assert not context.args
    if verb == "tune" and "--resume" not in arguments:
        monkeypatch.chdir(ROOT)
        path, overrides = split_arguments(arguments, shipped)
        composed = compose(path, overrides)
        assert composed.space or (path is None and composed.explicit["data"])  # without one, what suits the data


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in commands("make")} | set(re.findall(r"`make ([\w-]+)`", README))
    assert named and named <= targets


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").count("Apache License") >= 1


def test_both_promised_commands_come_first() -> None:
    assert [words[0] for words in (commands("make")[:1] + commands("medray")[:1])] == ["make", "medray"]
    assert LINES[0].startswith("make demo") and LINES[1].startswith("medray tune")
