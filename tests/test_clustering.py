"""Clusters by coactivity: the reference's recorded costs and merges, and what greedy merging must find and must leave."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.clustering import Groups, activity, clustered, misplaced, pairs_apart
from decomp_bench.config import parse
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from tests.golden.recorded import Golden


def test_costs_lengths_and_merges_are_the_references():
    golden = Golden("metrics_clustering_spd_main")
    groups = Groups.of(golden["in.active"])
    golden.agrees("out.coact", groups.together)
    for alpha in (0.5, 1.0, 2.0):
        golden.agrees(f"out.mdl.identity.alpha{alpha}", torch.tensor(groups.length(alpha)))
        away = ~torch.eye(6, dtype=torch.bool)
        golden.agrees(f"out.merge_costs.identity.alpha{alpha}", groups.costs(alpha), away)
    for number, pair in ((1, (0, 1)), (2, (2, 3))):
        before, cost = groups.length(1.0), float(groups.costs(1.0)[pair])
        groups = groups.merged(*pair)
        assert groups.length(1.0) - before == pytest.approx(cost, rel=1e-9)
        assert torch.equal(groups.active, golden[f"out.after_merge{number}.active"])
        golden.agrees(f"out.after_merge{number}.coact", groups.together)
        golden.agrees(f"out.after_merge{number}.mdl.alpha1.0", torch.tensor(groups.length(1.0)))
        away = ~torch.eye(len(groups.members), dtype=torch.bool)
        golden.agrees(f"out.after_merge{number}.merge_costs.alpha1.0", groups.costs(1.0), away)
        labels = [next(g for g, one in enumerate(groups.members) if i in one) for i in range(6)]
        assert labels == golden[f"out.after_merge{number}.group_idxs"].tolist()


def test_distances_are_the_references():
    golden = Golden("metrics_clustering_spd_main")
    labels = golden["in.labels"]
    for i in range(4):
        for j in range(i):
            assert misplaced(labels[i], labels[j]) == golden["out.perm_invariant_hamming"][i, j]
            assert pairs_apart(labels[i], labels[j]) == golden["out.matching_dist"][j, i]
    assert misplaced(labels[0], labels[0]) == pairs_apart(labels[0], labels[0]) == 0


def test_components_of_one_cause_are_one_group_and_others_stay_apart():
    generator = torch.Generator().manual_seed(0)
    causes = torch.rand(600, 4, generator=generator) < 0.1
    found = clustered(causes[:, [0, 1, 2, 0, 3, 1, 0]], alpha=3.0)
    assert sorted(found.members) == [[0, 3, 6], [1, 5], [2], [4]]
    assert found.length(3.0) < Groups.of(causes[:, [0, 1, 2, 0, 3, 1, 0]]).length(3.0)
    assert clustered(torch.ones(5, 1, dtype=torch.bool)).members == [[0]]


def test_activity_is_that_of_all_sites(lm):
    target, source = lm
    kind = method("transcoder")
    made = kind(parse(kind.Config, {"features": 24, "k": 4, "activation": "topk"}, "test"), target, (0, 2), 0).eval()
    active, names = activity(made, source, 200)
    assert active.shape[1] == len(names)
    assert {site for site, _ in names} == {site.name for site in made.sites}
    assert float(active.sum(1).double().mean()) == pytest.approx(8, abs=0.5)
    with pytest.raises(UserError, match="no gate is above 1"):
        activity(made, source, 200, threshold=1.0)
