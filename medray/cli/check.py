"""``medray check DATA``: find what is wrong with the data, and write the manifest."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import progress, run_folder, say, table

SHOWN = 10
"""Findings of one rule that are printed; the manifest holds them all."""


def check(
    data: Annotated[str, typer.Argument(help="A folder, table, dataset.json, .npz, DICOM tree, or phantom://NAME.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for manifest.json [default: runs/NAME]")
    ] = None,
    task: Annotated[
        str, typer.Option(help="What is to be learnt: classification, multilabel, segmentation, ordinal.")
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Treat every finding as an error.")] = False,
) -> None:
    """Read every image, look for what would spoil a model, and write the manifest.

    Exits with 1 where a finding is an error; with --strict, where there is any finding.
    """
    from medray.workflows.check import check_data

    folder = out or run_folder(data)
    with progress("checking") as show:
        manifest = check_data(data, folder / "manifest.json", task=task, progress=show)
    patients = len({case.group for case in manifest.cases})
    sites = len({case.site for case in manifest.cases if case.site})
    say(
        f"{len(manifest.cases)} cases of {patients} patients"
        + (f" from {sites} sites" if sites > 1 else "")
        + f"; {manifest.task}, {manifest.ndim}-D, {manifest.modality}; classes: {', '.join(manifest.classes)}"
    )
    by_rule = defaultdict(list)
    for finding in manifest.findings:
        by_rule[finding.severity, finding.rule].append(finding)
    for (severity, rule), findings in sorted(by_rule.items()):
        say(f"\n{severity}: {rule} ({len(findings)})")
        table(("case", "what", "fix"), [(found.case or "", found.message, found.fix) for found in findings[:SHOWN]])
        if len(findings) > SHOWN:
            say(f"... and {len(findings) - SHOWN} more in the manifest")
    if not manifest.findings:
        say("nothing found")
    say(f"\nmanifest: {folder / 'manifest.json'}")
    if any(strict or finding.severity == "error" for finding in manifest.findings):
        raise typer.Exit(1)
