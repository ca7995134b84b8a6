"""Cases dealt out to sites: all of them once, patients whole, unevenly where that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from medray.config.federation import PartitionConfig
from medray.data.fingerprint import measure
from medray.data.fingerprint_merge import merge_fingerprints
from medray.data.manifest import Case, Manifest
from medray.data.partition import deal_out
from medray.data.phantoms import phantom_manifest
from medray.errors import DataError, FederationError, LeakError


def manifest(count: int = 120) -> Manifest:
    return phantom_manifest(f"phantom://xray-nodules?cases={count}&size=16")


@pytest.mark.parametrize("by", ["site", "dirichlet", "quantity"])
def test_every_case_has_one_site_and_every_patient(by: str) -> None:
    data = manifest()
    dealt = deal_out(data, PartitionConfig.model_validate({"by": by, "sites": 5}))
    assert sorted(index for part in dealt.values() for index in part) == list(range(120))
    homes = {case.group: name for name, part in dealt.items() for case in (data.cases[i] for i in part)}
    assert all(homes[data.cases[i].group] == name for name, part in dealt.items() for i in part)
    assert dealt == deal_out(data, PartitionConfig.model_validate({"by": by, "sites": 5}))
    assert len(dealt) == (3 if by == "site" else 5)


def test_small_alpha_is_uneven_and_large_is_even() -> None:
    data = manifest(400)

    def spread(by: str, alpha: float) -> float:
        dealt = deal_out(data, PartitionConfig.model_validate({"by": by, "alpha": alpha, "sites": 4}))
        if by == "quantity":
            return float(np.std([len(part) for part in dealt.values()]))
        return float(np.std([np.mean([data.cases[i].label == 1 for i in part]) for part in dealt.values()]))

    for by in ("quantity", "dirichlet"):
        assert spread(by, 0.2) > 3 * spread(by, 1000.0)
    assert min(map(len, deal_out(data, PartitionConfig(by="quantity", alpha=0.01)).values())) >= 2


def test_what_can_not_be_dealt_out_is_refused() -> None:
    data = manifest(12)
    with pytest.raises(DataError, match="two each"):
        deal_out(data, PartitionConfig(by="quantity", sites=50))
    nameless = data.model_copy(update={"cases": tuple(c.model_copy(update={"site": None}) for c in data.cases)})
    with pytest.raises(DataError, match="names no site"):
        deal_out(nameless, PartitionConfig())
    alike: list[Case] = [
        c.model_copy(update={"patient": "P", "site": s}) for c, s in zip(data.cases, "ab", strict=False)
    ]
    with pytest.raises(LeakError, match="patient P stands at a and at b"):
        deal_out(data.model_copy(update={"cases": tuple(alike)}), PartitionConfig())


def test_merged_fingerprints_are_what_pooled_data_would_give() -> None:
    data = manifest(60)
    dealt = deal_out(data, PartitionConfig())
    parts = [
        (name, measure(data.model_copy(update={"cases": tuple(data.cases[i] for i in part)})))
        for name, part in dealt.items()
    ]
    merged, pooled = merge_fingerprints(parts), measure(data)
    assert merged.intensity[0].mean == pytest.approx(pooled.intensity[0].mean, rel=1e-9)
    assert merged.intensity[0].std == pytest.approx(pooled.intensity[0].std, rel=1e-6)
    assert merged.intensity[0].p50 == pytest.approx(pooled.intensity[0].p50, rel=0.2)
    for name in ("cases", "patients", "sites", "class_cases", "bytes_total", "shape_min", "shape_median", "shape_max"):
        assert getattr(merged, name) == getattr(pooled, name), name
    assert merged.class_fraction == pytest.approx(pooled.class_fraction)
    odd = parts[1][1].model_copy(update={"classes": ("well", "ill")})
    with pytest.raises(FederationError, match="classes"):
        merge_fingerprints([parts[0], ("odd", odd)])
