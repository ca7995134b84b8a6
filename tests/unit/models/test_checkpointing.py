"""Gradient checkpointing: the same training with less memory, for every network of the catalogue."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medray.models import checkpointing
from medray.models.catalogue import CATALOGUE, lookup
from tests.unit.models.test_networks import ENTRIES, SUPERVISED, build_tiny

HALVED = {
    ("unet", 2), ("unet", 3), ("unetpp", 2), ("dynunet", 3), ("segresnet", 3), ("swin_unetr", 3), ("unetr", 3),
    ("transunet", 2), ("small_cnn", 2), ("resnet18", 2), ("resnet18", 3), ("densenet121", 2), ("densenet121", 3),
    ("vit_s", 2), ("swin", 2), ("convnext", 2), ("mobilenetv3", 2), ("medvit", 2),
}  # fmt: skip
"""Of these at least half of the bytes go, even at this size."""


WHOLE = {"linear"}
"""A single layer: there is nothing between its input and its output to compute again."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads may differ in their last bit from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noisy(name: str, ndim: int, **fields: object) -> tuple[nn.Module, Tensor]:
    """The network with all the randomness that it has, and a batch."""
    chances = {option: 0.2 for option in ("dropout", "drop_path") if option in lookup(name).options}
    model, shape, _ = build_tiny(name, ndim, **chances, **fields)
    return model.train(), torch.randn(2, 2, *shape)


def learn(model: nn.Module, x: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one pass from ``state`` leaves: outputs, gradients, buffers, and the generator."""
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    outputs = model(x)
    levels = [outputs] if isinstance(outputs, Tensor) else outputs
    sum(level.square().mean() for level in levels).backward()
    left = {f"output {i}": level.detach() for i, level in enumerate(levels)}
    left |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    left |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return left | {"generator": torch.get_rng_state()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize(("name", "ndim"), ENTRIES)
def test_what_is_learnt_stays_the_same(name: str, ndim: int) -> None:
    """Outputs, gradients, running statistics and draws, bit for bit; with fewer bytes kept for backward."""
    model, x = noisy(name, ndim)
    state = copy.deepcopy(model.state_dict())
    plain, before = learn(model, x, state), checkpointing.saved_bytes(model, x)
    names = checkpointing.apply(model, "auto", x)
    assert bool(names) is (name not in WHOLE)
    assert not differing(plain, learn(model, x, state))
    if name in WHOLE:
        return
    assert checkpointing.saved_bytes(model, x) <= (0.5 if (name, ndim) in HALVED else 0.8) * before
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize(("name", "ndim"), SUPERVISED)
def test_with_deep_supervision_and_any_number_of_segments(name: str, ndim: int) -> None:
    model, x = noisy(name, ndim, deep_supervision=True)
    state = copy.deepcopy(model.state_dict())
    plain = learn(model, x, state)
    for number in (1, 3, 9, 100):
        checkpointing.apply(model, number, x)
        assert not differing(plain, learn(model, x, state)), number


@pytest.mark.parametrize("name", ["unet", "resnet18", "swin_unet"])
def test_more_segments_are_finer_ones_and_none_lies_within_another(name: str) -> None:
    model, x = noisy(name, 2)
    few, many = checkpointing.apply(model, 4, x), checkpointing.apply(model, 12, x)
    assert 4 <= len(few) < len(many)
    for names in (few, many):
        assert not [(a, b) for a in names for b in names if a != b and b.startswith(f"{a}.")]


def test_a_choice_repeats_itself() -> None:
    model, x = noisy("densenet121", 2)
    assert checkpointing.apply(model, "auto", x) == checkpointing.apply(model, "auto", torch.randn_like(x))


def test_another_process_can_decide() -> None:
    model, x = noisy("unet", 2)
    assert checkpointing.apply(model, "auto", x, agree=lambda _: ("decoder",)) == ("decoder",)
    assert checkpointing.apply(model, "off", x) == ()


def test_measuring_leaves_no_trace() -> None:
    model, x = noisy("small_cnn", 2)
    model.features[0].eval()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [part.training for part in model.modules()]
    checkpointing.saved_bytes(model, x)
    checkpointing.apply(model, "auto", x)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [part.training for part in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_off_makes_it_plain_again_and_a_copy_stands_alone() -> None:
    model, x = noisy("unet", 2)
    kinds = [type(part) for part in model.modules()]
    before = checkpointing.saved_bytes(model, x)
    checkpointing.apply(model, 6, x)
    twin = copy.deepcopy(model)
    checkpointing.apply(model, "off", x)
    assert [type(part) for part in model.modules()] == kinds
    assert checkpointing.saved_bytes(model, x) == before > checkpointing.saved_bytes(twin, x)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in twin.parameters())


def test_evaluation_runs_each_module_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = noisy("unet", 2)
    checkpointing.apply(model, 6, x)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to run again here")

    monkeypatch.setattr(checkpointing, "checkpoint", refuse)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    with pytest.raises(AssertionError, match="nothing is to run again"):
        model(x)


def test_bytes_are_counted_exactly() -> None:
    """A ReLU's output is what both it and the next layer keep; the input and the weights are there anyway."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert checkpointing.saved_bytes(model, torch.randn(3, 4)) == 3 * 8 * 4
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    assert checkpointing.saved_bytes(nested, x) == 3 * 8 * 4 + 3 * 6 * 4
    assert checkpointing.apply(nested, 1, x) == ("",)
    assert checkpointing.saved_bytes(nested, x) == 0
    assert checkpointing.apply(nested, 2, x) == ("0",)
    assert checkpointing.saved_bytes(nested, x) == 3 * 6 * 4


class _Talks(nn.Module):
    """A block that takes a list and a keyword, and gives a dictionary of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4), nn.Tanh())

    def forward(self, parts: list[Tensor], *, scale: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        total = self.linear(parts[0] + parts[1]) * scale
        return {"both": (total, total.exp())}


class _Conversation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Talks() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            one, two = block([x, x * 2], scale=self.scale * 2)["both"]
            x = one + two
        return x


def test_blocks_may_take_and_give_lists_dictionaries_and_keywords() -> None:
    torch.manual_seed(0)
    model, x = _Conversation().train(), torch.randn(5, 4)
    state = copy.deepcopy(model.state_dict())
    plain = learn(model, x, state)
    assert checkpointing.apply(model, 3, x) == ("blocks.0", "blocks.1", "blocks.2")
    assert not differing(plain, learn(model, x, state))


class _Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2.0)) + 1.0


def test_a_block_that_overwrites_its_input_is_no_segment_but_its_parts_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), _Overwrites(), _Overwrites()).train()
    x = torch.randn(5, 4)
    state = copy.deepcopy(model.state_dict())
    plain = learn(model, x, state)
    assert checkpointing.apply(model, 2, x) == ("1.inner", "2.inner")
    assert not differing(plain, learn(model, x, state))


@pytest.mark.parametrize("name", ["unet", "vit_s", "resnet18"])
def test_under_autocast(name: str) -> None:
    model, x = noisy(name, 2)
    state = copy.deepcopy(model.state_dict())

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    cast = Cast()
    state = {f"model.{key}": value for key, value in state.items()}
    plain, before = learn(cast, x, state), checkpointing.saved_bytes(cast, x)
    checkpointing.apply(cast, "auto", x)
    assert not differing(plain, learn(cast, x, state))
    assert checkpointing.saved_bytes(cast, x) < before


def test_every_family_has_a_share() -> None:
    assert checkpointing.KEPT.keys() <= {spec.family for spec in CATALOGUE.values()}
    assert all(0 < checkpointing.share_kept(spec.family) <= 0.5 for spec in CATALOGUE.values())
