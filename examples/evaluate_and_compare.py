"""Score a bundle on labelled data that it has never seen, and compare two bundles on the same cases.

    python examples/evaluate_and_compare.py BUNDLE OTHER [DATA]

On the command line: medray evaluate BUNDLE DATA --compare OTHER -o FOLDER.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from medray.workflows.evaluation import evaluate


def main(bundle: str, other: str, data: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(bundle, data, compare=other, out=Path(folder))
        print("written:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))

    # Intervals are of the bootstrap over patients: two images of one person are no two witnesses.
    print(f"{found.cases} cases of {found.patients} patients")
    for name, interval in found.metrics.items():
        print(f"{name}: {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    for site, figures in found.sites.items():
        print(f"site {site}: {figures}")

    # Pairwise: the same patients are drawn for both, so that what is hard for both cancels out.
    assert found.comparison is not None
    for name, more in found.comparison.difference.items():
        verdict = "no difference shown" if more.low <= 0 <= more.high else "a difference"
        print(f"{name}, first minus second: {more.value:+.3f} ({more.low:+.3f} to {more.high:+.3f}): {verdict}")
    for note in found.notes:  # what a reader of these figures has to know
        print("note:", note)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(
        sys.argv[1],
        sys.argv[2],
        sys.argv[3] if len(sys.argv) > 3 else "phantom://fundus-vessels?cases=8&seed=9&size=32",
    )
