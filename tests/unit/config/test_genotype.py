"""Genotypes as files and as names: what comes back, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medray.config.compose import compose
from medray.config.genotype import CELLS, MOST_BYTES, OPERATIONS, Genotype, embedded
from medray.config.schema import ModelConfig
from medray.errors import ConfigError

NODES = [[[0, "sep3"], [1, "skip"]], [[0, "conv3"], [2, "max3"]]]
PLAIN = {"version": 1, "kind": "classification", "cells": {"normal": NODES, "reduce": NODES}}
NAME = "genotype:classification:normal=0.sep3+1.skip,0.conv3+2.max3:reduce=0.sep3+1.skip,0.conv3+2.max3"


@st.composite
def genotypes(draw):
    kind = draw(st.sampled_from(sorted(CELLS)))
    count = draw(st.integers(1, 8))
    cells = {
        name: [
            [
                (source, draw(st.sampled_from(OPERATIONS)))
                for source in draw(
                    st.lists(st.integers(0, node + 1), min_size=1, max_size=min(4, node + 2), unique=True)
                )
            ]
            for node in range(count)
        ]
        for name in CELLS[kind]
    }
    return Genotype.model_validate({"kind": kind, "cells": cells})


@given(genotypes())
@settings(max_examples=60, deadline=None)
def test_a_genotype_comes_back_from_its_name_and_its_json(genotype):
    assert Genotype.of(genotype.name) == genotype
    assert Genotype.model_validate(json.loads(genotype.model_dump_json())) == genotype


def test_a_file_becomes_a_name_that_needs_it_no_more(tmp_path):
    path = tmp_path / "genotype.json"
    Genotype.model_validate(PLAIN).save(path)
    assert Genotype.load(path).name == NAME
    assert embedded(f"genotype:{path}") == NAME and embedded(NAME) == NAME
    assert embedded("unet") == "unet" and embedded(None) is None
    composed = compose(None, [f"model.name=genotype:{path}", f"space.model.name.choice=['genotype:{path}',unet]"])
    path.unlink()
    assert composed.explicit["model"]["name"] == NAME
    assert composed.space["model.name"]["choice"] == [NAME, "unet"]


def test_equal_genotypes_have_equal_names_whatever_the_order_of_their_cells():
    turned = {**PLAIN, "cells": dict(reversed(PLAIN["cells"].items()))}
    assert Genotype.model_validate(turned).name == NAME


def test_a_configuration_from_elsewhere_opens_no_file(tmp_path):
    """A federation's hub names a model; only compose(), which reads what a user typed, looks at paths."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert ModelConfig(name=f"genotype:{secret}").name == f"genotype:{secret}"


def changed(**fields):
    return json.dumps(PLAIN | fields)


def cells(nodes):
    return changed(cells={"normal": nodes, "reduce": nodes})


HOSTILE = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1e999",
    "deep": "[" * 60_000,
    "another version": changed(version=2),
    "another kind": changed(kind="detection"),
    "an unknown key": changed(code="import os"),
    "a missing cell": changed(cells={"normal": NODES}),
    "a foreign cell": changed(cells={"normal": NODES, "reduce": NODES, "up": NODES}),
    "cells of another kind": changed(kind="segmentation"),
    "unequal cells": changed(cells={"normal": NODES, "reduce": NODES[:1]}),
    "no nodes": cells([]),
    "too many nodes": cells([[[0, "skip"]]] * 9),
    "a node without inputs": cells([[]]),
    "too many inputs": cells([[[0, "skip"]]] * 5 + [[[i, "skip"] for i in range(5)]]),
    "an input twice": cells([[[0, "skip"], [0, "sep3"]]]),
    "an input ahead": cells([[[2, "skip"]], [[0, "skip"]]]),
    "a negative input": cells([[[-1, "skip"]]]),
    "an input as text": cells([[["0", "skip"]]]),
    "a truth value": cells([[[True, "skip"]]]),
    "an unknown operation": cells([[[0, "eval"]]]),
    "an operation too many": cells([[[0, "skip", "sep3"]]]),
    "an object": cells([[{"input": 0}]]),
    "a huge number": cells([[[10**400, "skip"]]]),
    "too large": " " * (MOST_BYTES + 1),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "genotype.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="genotype") as caught:
        Genotype.load(path)
    assert len(str(caught.value)) < 700


def test_what_is_no_readable_file_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "none", tmp_path / "binary", "/dev/zero"):
        with pytest.raises(ConfigError, match=r"genotype\.json"):
            embedded(f"genotype:{path}")


@pytest.mark.parametrize(
    "name",
    ["genotype:", "genotype:classification", NAME + ":more=0.skip", NAME.replace("sep3", "eval"), NAME + "+0.skip",
     NAME.replace("reduce", "normal"), NAME.replace("0.sep3+1.skip", "٣.sep3"), NAME + "\n",
     NAME.replace("0.", "7.", 1)],
)  # fmt: skip
def test_a_name_that_holds_none_is_refused(name):
    with pytest.raises(ConfigError, match="holds no genotype"):
        Genotype.of(name)
