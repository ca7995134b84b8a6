"""Measure data, plan an experiment for them and for this machine, change it.

    python examples/plan_and_edit.py [DATA [FOLDER]]

On the command line: medray plan DATA -o FOLDER, then an editor, then medray train FOLDER/experiment.yaml.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from medray.config.compose import build_experiment, compose
from medray.data.fingerprint import Fingerprint
from medray.errors import ConfigError
from medray.plan.machine import GIB, Machine
from medray.plan.plan import plan
from medray.workflows.planning import plan_data


def main(source: str, folder: Path) -> None:
    # The plan is a file that a person can read. It is what trial 0 of a study trains.
    path = plan_data(source, folder, budget=600.0)
    print("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))

    # Edit the file, or change fields as on the command line. Both are checked alike.
    experiment = build_experiment(compose(path, ["optim.lr=5e-4", "augment.strength=0.5"]).explicit)
    print(f"model {experiment.model.name}, patch {experiment.train.patch_size}, lr {experiment.optim.lr}")
    try:
        compose(path, ["optim.learning_rate=1"])
    except ConfigError as error:
        print(f"a wrong field is refused: {error}\n")

    # Another network, or another machine, is planned anew: whatever depends on them follows.
    fingerprint = Fingerprint.load(folder / "fingerprint.json")
    server = Machine(cpus=32, memory=256 * GIB, gpus=1, gpu_memory=80 * GIB)
    for where, machine in (("here", Machine.here()), ("on a large GPU", server)):
        for model in ("unet", "segresnet"):
            tree = plan(fingerprint, machine, model=model)
            train = tree["train"]
            print(
                f"{model} {where}: patch {train['patch_size']}, batch {train['batch_size']}, lr {tree['optim']['lr']}"
            )


if __name__ == "__main__":
    data = sys.argv[1] if len(sys.argv) > 1 else "phantom://ct-lesions?cases=10&size=24"
    if len(sys.argv) > 2:
        main(data, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(data, Path(temporary))
