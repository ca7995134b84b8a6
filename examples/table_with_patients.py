"""A CSV with patients, sites and clinical columns; and splits that never tear a patient apart.

    python examples/table_with_patients.py

Columns: image, and label (or mask, or several 0/1 columns label_*). patient, site and split are optional; all others
are kept as clinical columns. Columns with other names are named behind the path: "cases.csv?image=file&patient=mrn".
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from pathlib import Path

from medray.config.schema import SplitConfig
from medray.data.phantoms import phantom_manifest, write_phantom
from medray.data.splits import make_splits
from medray.workflows.check import check_data


def write_table(folder: Path) -> Path:
    """The images of a phantom, and a table as a hospital might export it."""
    write_phantom("xray-nodules", folder, cases=30, size=32)
    truth = phantom_manifest("phantom://xray-nodules?cases=30&size=32")
    pictures = sorted((folder / "images").glob("*.png"))
    table = folder / "export.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "diagnosis", "mrn", "site", "age"])
        for number, (picture, case) in enumerate(zip(pictures, truth.cases, strict=True)):
            diagnosis = truth.classes[int(case.label)]  # type: ignore[arg-type]
            writer.writerow([f"images/{picture.name}", diagnosis, case.patient, case.site, 40 + number])
    return table


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder))
        manifest = check_data(f"{table}?image=file&label=diagnosis&patient=mrn")
        first = manifest.cases[0]
        print(f"classes {manifest.classes}; sites {dict(Counter(case.site for case in manifest.cases))}")
        print(f"first case: patient {first.patient}, site {first.site}, clinical columns {first.columns}")

        # Grouped by patient, stratified by label. A `split` column in the table would win over all of this.
        splits = make_splits(manifest, SplitConfig(folds=4, fold=0, test=0.2), seed=0)
        sides = {name: {manifest.cases[i].patient for i in getattr(splits, name)} for name in ("train", "val", "test")}
        for name, patients in sides.items():
            print(f"{name}: {len(getattr(splits, name))} cases of {len(patients)} patients")
        assert not (sides["train"] & sides["val"] or sides["train"] & sides["test"] or sides["val"] & sides["test"])
        print("no patient stands on two sides")


if __name__ == "__main__":
    main()
