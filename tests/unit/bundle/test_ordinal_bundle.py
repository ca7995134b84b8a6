"""Bundles whose networks have fewer outputs than there are classes: grades."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medray.bundle.read import Bundle
from medray.data.image import Image
from medray.errors import BundleError

GRADES = ["none", "mild", "moderate", "severe"]


@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_an_ensemble_of_graders_is_one_graph_and_answers_the_median(write_tiny, tmp_path, rule) -> None:
    bundle: Bundle = write_tiny(tmp_path / rule, "ordinal", outputs=3, members=3, onnx=True, classes=GRADES, rule=rule)
    inputs, logits = bundle.golden()
    assert logits.shape == (len(inputs), 3)
    exported = bundle.predictor("onnx")  # which reproduces the golden logits, or there is none
    assert np.allclose(exported(inputs), bundle.model()(torch.from_numpy(inputs)).detach().numpy(), atol=1e-4)
    image = Image(array=np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32), spacing=None)
    found = bundle.predict(image, exported)
    assert found.probabilities is not None and found.probabilities.shape == (4,)
    assert found.probabilities.sum() == pytest.approx(1, abs=1e-5)
    above = 1 - found.probabilities.cumsum()[:-1]
    assert found.decisions == (int((above > 0.5).sum()),) and found.labels is None


def test_a_grader_with_an_output_for_each_grade_is_refused(write_tiny, tmp_path) -> None:
    with pytest.raises(BundleError, match="4 outputs for 4 classes of a ordinal task"):
        write_tiny(tmp_path / "wrong", "ordinal", outputs=4, classes=GRADES)
