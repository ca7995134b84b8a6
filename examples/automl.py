"""A study from Python, as a notebook runs it: data and a budget in, a leaderboard, a champion and answers out.

python examples/automl.py [DATA, or the folder of a study]
"""

from __future__ import annotations

import sys
from pathlib import Path

import medray

UNSEEN = ["phantom://fundus-vessels?seed=9&size=32&cases=4&index=0"]


def main(data: str) -> None:
    if (Path(data) / "study.yaml").is_file():
        study = medray.AutoML.load(data)  # begun before, here or by `medray tune`
    else:
        study = make(data)
    study.optimize()  # goes on where it was cut off; one that has ended is left as it is

    print(study.leaderboard().to_string())
    champion = study.champion()
    print(champion.headline)

    # New images; of a segmentation, 'output' is the mask's file, in the image's own geometry.
    answers = study.predict(UNSEEN, out="answers")
    print(answers[["prediction", "output"]].to_string())
    print("report:", study.report().path)


def make(data: str) -> medray.AutoML:
    # In a notebook the study, its champion and its report show themselves: end a cell with their name.
    return medray.AutoML(
        data,
        metric="dice",
        trials=3,
        budget="40s",  # of wall clock, for everything; hours on real data
        # Without a space, the one that suits the data is taken: cls, seg, seg3d or table.
        space={"optim.lr": {"float": [1e-3, 1e-2], "log": True}, "loss.name": {"choice": ["dice_ce", "tversky"]}},
        name="automl",
        overrides=["model.feature_size=8"],
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "phantom://fundus-vessels?cases=24&size=32")
