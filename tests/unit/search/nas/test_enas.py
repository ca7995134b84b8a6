"""ENAS: the controller learns what is rewarded, and shared weights are those of the discrete network."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from medray.config.genotype import CELLS
from medray.config.schema import NasConfig
from medray.models.cells import Plan
from medray.search.nas.draw import random_genotype
from medray.search.nas.enas import Controller, Enas, Reinforce
from medray.search.nas.strategy import Problem
from medray.search.nas.supernet import SuperNetwork
from medray.train.runtime import LocalRuntime


def rigged(genotype):
    """The share of edges that are dilated convolutions on the latest input."""
    edges = [(n, edge) for nodes in genotype.cells.values() for n, node in enumerate(nodes) for edge in node]
    return sum((name == "dil3") + (source == n + 1) for n, (source, name) in edges) / (2 * len(edges))


def test_the_controller_learns_a_rigged_reward():
    controller = Controller("classification", 2, torch.Generator().manual_seed(0))
    learner = Reinforce(controller, lr=0.02, entropy=1e-3, decay=0.8)
    means = []
    for _ in range(35):
        samples = [controller.write() for _ in range(4)]
        means.append(learner.learn(samples, [rigged(sample.genotype) for sample in samples]))
    assert sum(means[-10:]) / 10 > sum(means[:10]) / 10 + 0.25
    with torch.no_grad():
        assert rigged(controller.write(greedy=True).genotype) >= 0.7  # of two inputs, one alone can be the latest: 0.75


def test_reward_above_the_baseline_makes_a_genotype_likelier_and_entropy_keeps_choices_open():
    for reward, sign in ((1.0, 1), (0.0, -1)):
        controller = Controller("segmentation", 2, torch.Generator().manual_seed(1))
        learner = Reinforce(controller, lr=1e-3, entropy=0.0, decay=0.5)
        learner.baseline = 0.5
        state = controller.generator.get_state()
        sample = controller.write()
        learner.learn([sample], [reward])
        controller.generator.set_state(state)
        again = controller.write()
        assert again.genotype == sample.genotype
        assert sign * float((again.log_probability - sample.log_probability).detach()) > 0
        assert learner.baseline == pytest.approx(0.5 * 0.5 + 0.5 * reward)
    controller = Controller("segmentation", 2, torch.Generator().manual_seed(1))
    learner = Reinforce(controller, lr=1e-2, entropy=1.0, decay=0.5)
    with torch.no_grad():
        controller.to_name.bias[0] = 10.0
        low = float(controller.write(greedy=True).entropy)
    for _ in range(20):
        learner.learn([controller.write()], [0.5])
    assert float(controller.write(greedy=True).entropy.detach()) > low


@pytest.mark.parametrize("kind", CELLS)
def test_what_is_written_is_always_a_genotype_of_the_size_asked(kind):
    controller = Controller(kind, 4, torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = [controller.write().genotype for _ in range(8)]
    assert {genotype.nodes for genotype in found} == {4} and len({genotype.name for genotype in found}) > 6
    assert all(len(node) == 2 for genotype in found for nodes in genotype.cells.values() for node in nodes)


def problem(kind="classification"):
    torch.manual_seed(0)
    plan = Plan(ndim=2, in_channels=1, num_outputs=2, nodes=2, width=2, depth=2, extent=8)
    return Problem(
        net=SuperNetwork(kind, plan).train(),
        criterion=nn.CrossEntropyLoss(),
        runtime=LocalRuntime(),
        precision="fp32",
        config=NasConfig(strategy="enas", nodes=2, keep=3),
    )


def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(6, 1, 8, 8, generator=draw)
    return {"image": image, "target": (image.mean((1, 2, 3)) > 0).long()}


def test_a_step_goes_on_after_a_checkpoint_and_the_end_ranks_by_reward():
    one, other = Enas(problem()), Enas(problem())
    assert "reward" not in one.step(batch(0), batch(1), 0.0)
    figures = one.step(batch(0), batch(1), 0.5)
    assert 0.0 < figures["reward"] < 1.0
    other.load_state_dict(deepcopy(one.state_dict()))
    assert one.step(batch(2), batch(3), 0.6) == other.step(batch(2), batch(3), 0.6)
    found = one.finish(iter([batch(4), batch(5), batch(6), batch(7)]))
    assert len(found) == 3 and len({genotype.name for genotype in found}) == 3
    worth = [one._reward(genotype, [batch(n) for n in (4, 5, 6, 7)]) for genotype in found]
    assert worth == sorted(worth, reverse=True)


def test_only_the_chosen_operations_learn():
    case = problem()
    case.net.choose(random_genotype("classification", 2, 5))
    case.loss(batch(0)).backward()
    silent = [name for name, p in case.net.named_parameters() if p.requires_grad and p.grad is None]
    assert silent and all(".edges." in name for name in silent)
