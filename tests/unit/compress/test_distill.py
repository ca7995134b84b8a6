from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medray.compress.distill import DistillationLoss, Taught
from medray.config.schema import LossConfig
from medray.errors import CompressionError
from medray.tasks.catalogue import build_loss
from medray.train.runtime import LocalRuntime
from medray.train.step import Stepper


def hard(kind, name):
    return build_loss(LossConfig(name=name), kind=kind, num_classes=3)


def test_the_student_alone_is_its_state_and_its_answer():
    student, teacher = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    taught = Taught(student, teacher)
    assert set(taught.state_dict()) == {"student.weight", "student.bias"}
    assert {id(p) for p in taught.parameters()} == {id(p) for p in student.parameters()}
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(taught.eval()(x), student(x))
    own, soft = taught.train()(x)
    assert torch.equal(own, student(x))
    torch.testing.assert_close(soft, teacher(x))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_loss_is_hinton_s():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    target = torch.tensor([0, 1, 2, 1, 0])
    found = DistillationLoss(hard("classification", "cross_entropy"), "classification", temperature=3.0, alpha=0.7)(
        [student, teacher], target
    )
    soft = F.kl_div(
        F.log_softmax(student / 3, 1), F.log_softmax(teacher / 3, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(found, 0.3 * F.cross_entropy(student, target) + 0.7 * 9 * soft)


@pytest.mark.parametrize(
    ("kind", "name", "shape", "target"),
    [
        ("classification", "cross_entropy", (4, 3), torch.tensor([0, 1, 2, 0])),
        ("multilabel", "bce", (4, 3), torch.ones(4, 3)),
        ("segmentation", "cross_entropy", (4, 3, 5, 6), torch.zeros(4, 5, 6, dtype=torch.int64)),
    ],
)
def test_parts_sum_up_to_the_whole_and_agreement_costs_nothing(kind, name, shape, target):
    torch.manual_seed(0)
    student, teacher = torch.randn(shape), torch.randn(shape)
    loss = DistillationLoss(hard(kind, name), kind, temperature=2.0, alpha=0.5)
    assert loss.separable
    whole = loss([student, teacher], target)
    parts = sum(loss([student[p], teacher[p]], target[p], target) for p in (slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(whole, parts)
    taught = DistillationLoss(hard(kind, name), kind, temperature=2.0, alpha=1.0)
    assert taught([teacher, teacher], target).abs() < 1e-5 < taught([student, teacher], target)


def test_a_student_learns_what_its_teacher_answers():
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    taught, loss = (
        Taught(student, teacher),
        DistillationLoss(hard("classification", "cross_entropy"), "classification", temperature=1.0, alpha=1.0),
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    x, wrong = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
    for _ in range(200):
        optimizer.zero_grad()
        loss(taught.train()(x), wrong).backward()
        optimizer.step()
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.95


@pytest.mark.parametrize("name", ["cross_entropy", "dice_ce"])
def test_a_step_in_parts_has_the_whole_s_gradient(name):
    """fit() splits a batch that doesn't fit; Dice over the batch takes two passes through all that forward gives."""
    found = []
    batch = {"image": torch.randn(4, 1, 6, 6), "target": torch.randint(0, 3, (4, 6, 6)), "index": torch.arange(4)}
    for micro in (None, 2):
        torch.manual_seed(0)
        taught = Taught(nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)).train()
        optimizer = torch.optim.SGD(taught.parameters(), lr=1.0)
        stepper = Stepper(
            taught,
            optimizer,
            DistillationLoss(hard("segmentation", name), "segmentation", temperature=2.0, alpha=0.5),
            runtime=LocalRuntime(),
            precision="fp32",
            micro_batch=micro,
            clip_norm=0.0,
            channels_last=False,
        )
        stepper(batch, place=lambda: "here")
        found.append(torch.cat([p.detach().flatten() for p in taught.parameters()]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"alpha": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(CompressionError, match="must lie in"):
        DistillationLoss(hard("multilabel", "bce"), "multilabel", **({"temperature": 2.0, "alpha": 0.5} | wrong))
