"""A bundle from a stranger: whatever is wrong with it is a BundleError."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from medray.bundle.read import Bundle
from medray.bundle.spec import MAX_SPEC_BYTES
from medray.bundle.write import derive
from medray.errors import BundleError


def edit(directory, change):
    path = directory / "bundle.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def reseal(directory, name):
    """Make the hash right again, as someone would who altered a file on purpose."""
    blob = (directory / name).read_bytes()

    def change(tree):
        tree["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}

    edit(directory, change)


def test_the_copy_itself_opens(bundle_dir):
    assert Bundle.open(bundle_dir).spec.name == "tiny"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "weights/../../x", "a\\..\\b", "", ".hidden", "a//b", "ä", "a/b/c/d/e/f"]
)
def test_names_that_lead_out_are_refused(bundle_dir, name):
    edit(bundle_dir, lambda tree: tree["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(BundleError, match="plain relative path"):
        Bundle.open(bundle_dir)


def test_links_that_lead_out_are_refused(bundle_dir, tmp_path):
    weights = bundle_dir / "weights/member-0.safetensors"
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="by a link"):
        Bundle.open(bundle_dir)


@pytest.mark.parametrize("name", ["weights/member-0.safetensors", "golden.safetensors", "card.md"])
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove"])
def test_altered_files_are_refused(bundle_dir, name, harm):
    path = bundle_dir / name
    blob = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        blob[len(blob) // 2] ^= 1
        path.write_bytes({"flip": blob, "cut": blob[:-1], "grow": blob + b"\0"}[harm])
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_dir)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(version=2),
        lambda tree: tree.update(surprise=1),
        lambda tree: tree.update(classes=["only"]),
        lambda tree: tree.update(classes=[f"c{i}" for i in range(300)]),
        lambda tree: tree.update(channels=10**9),
        lambda tree: tree.update(temperature=0),
        lambda tree: tree.update(temperature="NaN"),
        lambda tree: tree["inference"].update(patch_size=[16]),
        lambda tree: tree["inference"].update(patch_size=[0, 16]),
        lambda tree: tree["inference"].update(patch_size=[10**9, 16]),
        lambda tree: tree["inference"].update(flip_axes=[2]),
        lambda tree: tree["inference"].update(overlap=1.0),
        lambda tree: tree.update(thresholds=[0.5, 0.5, 0.5]),
        lambda tree: tree.update(members=[]),
        lambda tree: tree.update(precision="int1"),
        lambda tree: tree.update(pruned={"first": [1, 0, 1]}),
        lambda tree: tree.update(pruned={"first": [1, 10**9, 1]}),
        lambda tree: tree.update(pruned={"first": [1, 2, 1]}, members=tree["members"] * 2),
        lambda tree: tree.update(history=["x" * 30_000]),
        lambda tree: tree["files"].pop("weights/member-0.safetensors"),
        lambda tree: tree["files"]["card.md"].update(sha256="x"),
        lambda tree: tree["files"]["card.md"].update(bytes=-1),
        lambda tree: tree["members"][0].update(feature_size=10**9),
    ],
)
def test_fields_out_of_bounds_are_refused(bundle_dir, change):
    edit(bundle_dir, change)
    with pytest.raises(BundleError):
        Bundle.open(bundle_dir)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_SPEC_BYTES + 1)])
def test_what_is_no_specification_is_refused(bundle_dir, text):
    (bundle_dir / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.open(bundle_dir)


def test_a_folder_without_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "none")


def test_weights_of_another_network_are_refused(bundle_dir):
    edit(bundle_dir, lambda tree: tree["members"][0].update(feature_size=8))
    with pytest.raises(BundleError, match="not weights of 'tiny'"):
        Bundle.open(bundle_dir).predictor()


@pytest.mark.parametrize("pruned", [{"nowhere": [1, 1, 1]}, {"first": [1, 8, 1]}, {"first": [1, 2, 1]}])
def test_widths_that_do_not_belong_are_refused(bundle_dir, pruned):
    edit(bundle_dir, lambda tree: tree.update(pruned=pruned))
    with pytest.raises(BundleError, match="not weights of 'tiny'"):
        Bundle.open(bundle_dir).predictor()


def test_names_and_reasons_cannot_break_a_derived_card(bundle_dir, tmp_path):
    made = derive(Bundle.open(bundle_dir), tmp_path / "made", history=["From <script>\n# big"])
    assert made.spec.history == ("From <script>\n# big",)
    card = (made.directory / "card.md").read_text()
    assert "<script>" not in card and "\n# big" not in card and "## Compression" in card
    assert Bundle.open(bundle_dir).spec.history == ()


def test_a_file_that_is_no_safetensors_is_refused(bundle_dir):
    (bundle_dir / "weights/member-0.safetensors").write_bytes(b"\x80\x04\x95pickle" * 10)
    reseal(bundle_dir, "weights/member-0.safetensors")
    with pytest.raises(BundleError, match="not weights"):
        Bundle.open(bundle_dir).predictor()


@pytest.mark.parametrize("shape", [(0, 1, 16, 16), (1, 16, 16), (2, 1, 16, 16, 16)])
def test_golden_arrays_of_the_wrong_shape_are_refused(bundle_dir, shape):
    from safetensors.numpy import save_file

    save_file(
        {"input": np.zeros(shape, np.float32), "logits": np.zeros((1, 3, 16, 16), np.float32)},
        bundle_dir / "golden.safetensors",
    )
    reseal(bundle_dir, "golden.safetensors")
    with pytest.raises(BundleError, match="golden arrays"):
        Bundle.open(bundle_dir).predictor()


def test_swapped_weights_with_right_hashes_fail_the_golden_check(bundle_dir):
    from safetensors.numpy import load_file, save_file

    path = bundle_dir / "weights/member-0.safetensors"
    tensors = load_file(path)
    save_file({name: value + 0.01 for name, value in tensors.items()}, path)
    reseal(bundle_dir, "weights/member-0.safetensors")
    with pytest.raises(BundleError, match="golden outputs"):
        Bundle.open(bundle_dir).predictor()
