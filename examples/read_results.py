"""What a study leaves for programs: result.json, leaderboard.csv, and a line that a pipeline may decide by.

python examples/read_results.py runs/example
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path


def main(study: Path) -> None:
    # Present once the study has ended. A figure is [value, low, high], the limits of 95 %; null where there is none.
    result = json.loads((study / "result.json").read_text(encoding="utf-8"))
    print(result["headline"])
    for name, (value, low, high) in result["metrics"].items():
        print(f"  {name}: {value} ({low} to {high})")

    # The gain over the plan's own default, on cases that were used for no choice ("test"), or else optimistic.
    gain, low, _ = result["difference"]
    print(f"gain over the default: {gain:+.4f}, on {result['cases']} {result['measured_on']} cases")
    if low is not None and low > 0:
        print("the search has found something better than the default: its interval lies above 0")

    # Trials, best first; parameters stand in columns named by their path.
    with (study / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            print({name: text for name, text in row.items() if text})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
