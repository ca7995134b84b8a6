"""Networks for rows of a table, which come as (B, C, 1, 1): a linear model and a multi-layer perceptron.

Of an image they would see each channel's mean alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from medray.models.spec import ModelSpec, Request


class Linear(nn.Module):
    """Logistic regression: (B, C, *spatial) to (B, K)."""

    def __init__(self, inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, num_outputs)
        nn.init.zeros_(self.head.weight)  # convex: any start will do, and this one is the same everywhere
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(2).mean(-1))


class Perceptron(nn.Module):
    """``depth`` - 1 hidden layers of ``width``, layer norm, SiLU, dropout: (B, C, *spatial) to (B, K)."""

    def __init__(self, inputs: int, num_outputs: int, *, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU(), nn.Dropout(dropout)]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(2).mean(-1)))


def build_linear(request: Request) -> nn.Module:
    """Logistic regression."""
    return Linear(request.in_channels, request.num_outputs)


def build_mlp(request: Request) -> nn.Module:
    """A multi-layer perceptron."""
    return Perceptron(
        request.in_channels,
        request.num_outputs,
        width=request.feature_size,
        depth=request.depth,
        dropout=request.config.dropout,
    )


SPECS = (
    ModelSpec(
        name="linear",
        dense=False,
        ndims=(2, 3),
        tier="lightweight",
        family="table",
        description="logistic regression over a table's columns",
        build=build_linear,
        options=frozenset({"pretrained"}),
    ),
    ModelSpec(
        name="mlp",
        dense=False,
        ndims=(2, 3),
        tier="lightweight",
        family="table",
        description="multi-layer perceptron over a table's columns",
        build=build_mlp,
        options=frozenset({"feature_size", "depth", "dropout", "pretrained"}),
        feature_size=32,
        depth={2: 3, 3: 3},
    ),
)
