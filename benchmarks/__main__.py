"""``python -m benchmarks NAME [--quick]``, ``all``, ``report`` or ``list``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.common import FOLDER, RESULTS, ROOT, Result, names, question, render


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 0 where every target of a full run is met, 1 where one is missed or a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", help="a benchmark, or all, report, list", choices=[*names(), "all", "report", "list"])
    parser.add_argument("--quick", action="store_true", help="the same path at a size that ends in a minute")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: benchmarks/results; quick: runs/benchmarks)"
    )
    asked = parser.parse_args(arguments)
    if asked.name == "list":
        for name in names():
            print(f"{name:16} {question(name)}")
        return 0
    if asked.name == "report":
        (FOLDER / "README.md").write_text(render(), encoding="utf-8")
        print(FOLDER / "README.md")
        return 0
    out = asked.out or (ROOT / "runs" / "benchmarks" if asked.quick else RESULTS)
    failed = False
    for name in names() if asked.name == "all" else [asked.name]:
        print(f"\n## {name}: {question(name)}\n", flush=True)
        started = time.monotonic()
        try:
            result: Result = importlib.import_module(f"benchmarks.{name}").run(asked.quick)
        except SystemExit as missing:  # data or a peer that isn't there
            if asked.name != "all":
                raise
            print(f"skipped: {missing}")
            continue
        except Exception as error:
            if asked.name != "all":
                raise
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        path = result.save(name, out)
        print(result.table())
        print(f"\n{time.monotonic() - started:.0f} s; written to {path}", flush=True)
        failed |= not asked.quick and not all(result.met.values())  # at quick size a missed target says nothing
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
