"""Two runs beside each other: a run is itself whatever its order and gauge, chance is the null, and numbers are those by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench.alignment import align, measures, paired
from decomp_bench.banks import Bank, similarities
from decomp_bench.coactivity import Joint, Overlap
from decomp_bench.config import parse
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from tests.test_invariance import changed

COMPONENTS = 20


def make(name: str, target, seed: int = 0, **config):
    kind = method(name)
    return kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), seed).eval()


def spd(target, seed: int = 0, **config):
    return make("spd", target, seed, **{"components": COMPONENTS, "init": "random", "gate_hidden": (8,), "gate": "shared", **config})


def measured(frame):
    """(aspect, measure) -> value and null over all sites."""
    whole = frame[frame["site"] == "all"]
    return {(str(row["aspect"]), str(row["measure"])): (float(row["value"]), float(row["null"])) for row in whole.to_dict("records")}


def same(frame) -> None:
    found = measured(frame)
    assert found.pop(("output", "kl_first_second"))[0] == pytest.approx(0, abs=1e-5)
    for (aspect, measure), (value, null) in found.items():
        if aspect != "output":
            assert value == pytest.approx(1, abs=1e-3), (aspect, measure)
            assert null < 0.9, (aspect, measure)
    assert found["output", "kl_target_first"] == pytest.approx(found["output", "kl_target_second"], rel=1e-3, nan_ok=True)
    assert found["output", "kl_target_first"][0] > 1e-3


def test_a_run_is_itself_in_any_order_and_gauge(lm):
    target, source = lm
    made = spd(target)
    order = torch.randperm(COMPONENTS, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(0.5, 2, COMPONENTS) * (torch.arange(COMPONENTS) % 2 * 2 - 1)

    def turned(name: str, value: torch.Tensor) -> torch.Tensor:
        value = value * scale if name.endswith(".V") else value / scale[:, None] if name.endswith(".U") else value
        return value.index_select(list(value.shape).index(COMPONENTS), order) if COMPONENTS in value.shape else value

    frame = align(made, changed(made, turned), source, tokens=300)
    same(frame)
    assert set(frame["aspect"]) == {"read", "write", "whole", "gate", "activity", "active", "output"}
    assert frame.loc[frame["site"] == "0.mlp.up", "n_first"].max() <= COMPONENTS


@pytest.mark.parametrize("name", ["transcoder", "clt", "sae"])
def test_a_dictionary_is_itself_and_another_is_not(lm, name):
    target, source = lm
    made = make(name, target, features=24, activation="topk", k=6)
    same(align(made, made, source, tokens=300))
    other = measured(align(made, make(name, target, 1, features=24, activation="topk", k=6), source, tokens=300))
    for aspect in ("read", "write", "whole"):
        value, null = other[aspect, "nearest_first"]
        assert null - 0.1 < value < 0.8, aspect
    assert other["active", "one_to_one"][0] < 0.6
    assert other["output", "kl_first_second"][0] > 1e-3


def test_random_against_random_is_the_null(lm):
    target, source = lm
    found = measured(align(spd(target), spd(target, 1), source, tokens=300))
    for aspect in ("read", "write", "whole"):
        for key in ("one_to_one", "nearest_first", "nearest_second"):
            value, null = found[aspect, key]
            assert abs(value - null) < 0.05, (aspect, key)
    assert found["whole", "one_to_one"][1] < found["read", "one_to_one"][1] < 0.6


def test_components_of_a_higher_rank_and_of_rank_one(toy):
    target, source = toy
    made = make("apd", target, components=6, rank=2)
    frame = align(made, made, source, tokens=128)
    assert "read" not in set(frame["aspect"])
    assert measured(frame)["whole", "one_to_one"][0] == pytest.approx(1)
    assert measured(frame)["output", "mse_first_second"][0] == 0
    vectors = [(torch.randn(4, 5), torch.randn(4, 3)), (torch.randn(4, 2), torch.randn(4, 6))]
    one, other = Bank(vectors, None), Bank([(vectors[0][1].roll(1, 0)[:, [0, 1, 2, 0, 1]], vectors[0][1]), vectors[1]], None)
    matrices = Bank(None, [other_read[:, :, None] * other_write[:, None] for other_read, other_write in other.vectors or []])
    assert torch.allclose(similarities(one, other)["whole"], similarities(one, matrices)["whole"], atol=1e-6)


def test_components_that_are_left_over_count_as_nothing_in_common():
    eye = torch.eye(4)
    found = similarities(Bank([(eye[:3], eye[:3])], None), Bank([(eye[:1], -2 * eye[:1])], None))
    values = measures(found["whole"], paired(found["whole"]))
    expected = {"one_to_one": 1 / 3, "nearest_first": 1 / 3, "nearest_second": 1.0, "shared": 1 / 3}
    assert values == pytest.approx(expected)


def test_what_cannot_be_compared_is_said(lm, gated_lm):
    target, source = lm
    transcoder = make("transcoder", target, features=8, k=2)
    with pytest.raises(UserError, match="no site reads and writes the same in both"):
        align(transcoder, make("sae", target, features=8, k=2), source)
    with pytest.raises(UserError, match="different models"):
        align(transcoder, make("transcoder", gated_lm[0], features=8, k=2), source)


def test_correlations_and_overlaps_by_hand():
    generator = np.random.default_rng(0)
    a, b = generator.normal(5, 0.01, (90, 3)), generator.normal(0, 1, (90, 2))
    b[:, 0] += 100 * a[:, 1]
    a[:, 2] = 0.3
    joint, overlap = Joint(), Overlap()
    for part in np.array_split(np.arange(90), 4):
        one, other = (torch.from_numpy(value[part]).float() for value in (a, b))
        joint.add(one, other)
        overlap.add(one > 5, other > 500)
    found = joint.correlation().numpy()
    expected = np.corrcoef(a[:, :2].astype(np.float32), b.astype(np.float32), rowvar=False)[:2, 2:]
    assert found[:2] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(found[2]).all()
    on, off = a[:, 0] > 5, b[:, 0] > 500
    assert float(overlap.jaccard()[0, 0]) == pytest.approx((on & off).sum() / (on | off).sum())
