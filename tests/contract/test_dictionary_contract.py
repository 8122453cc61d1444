"""The contract, for every activation of the methods that train sparse coders, and for their skip connections, on a language model."""

from __future__ import annotations

import pytest

from tests.contract import test_contract
from tests.contract.test_contract import *  # noqa: F403 - its tests run here again, on the fixtures below

pytestmark = pytest.mark.slow  # two dozen trainings; test_contract runs the default of each method

ACTIVATIONS = ("relu", "topk", "jumprelu", "gated", "matryoshka", "groupmax")  # batchtopk is the default, which test_contract runs
OPTIONS = {
    "transcoder skip": ("transcoder", {"skip": True}),
    "clt skip": ("clt", {"skip": True}),
    "clt across layers": ("clt", {"across_layers": True}),
    "clt free rows": ("clt", {"decoder_rows": "free", "multi_k": 0.125, "k_start": 16}),
    "transcoder cascading": ("transcoder", {"train_on": "cascading"}),
    "clt single": ("clt", {"train_on": "single", "activation": "jumprelu"}),
    "sae resampled": ("sae", {"revive": "resample", "resample_every": 10, "dead_after": 500}),
}
CASES = {f"{name} {kind}": (name, {"activation": kind}) for name in ("sae", "transcoder", "clt") for kind in ACTIVATIONS} | OPTIONS


@pytest.fixture(scope="module")
def world(lm):
    return lm


@pytest.fixture(params=CASES, scope="module")
def one(request: pytest.FixtureRequest, world, tmp_path_factory):
    """(decomposer after a short training, source, batch with clean activations, its folder)"""
    target, source = world
    name, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    decomposer = test_contract.trained(test_contract.make(name, target, **config), source, folder)
    return decomposer, source, test_contract.a_batch(decomposer, source), folder
