"""Generation under an intervention: the cache changes nothing, draws are paired, special tokens do not appear."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench.fluency import Natural, distinct_share, fluency, harmonic, variety
from decomp_bench.generation import continuation_nll, generate, is_positionwise
from decomp_bench.intervene import Intervention, one
from tests.test_intervene import METHODS, make


@pytest.fixture
def prompts(lm):
    _, source = lm
    return source.batch("test", np.arange(6)).x[:, :8]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_gives_the_same_text_as_recomputing_every_prefix(lm, prompts, name, temperature):
    decomposer = make(name, lm[0])
    assert is_positionwise(decomposer, prompts)
    site = decomposer.sites[0]
    push = Intervention("add", one(site.name, 3), 4.0)
    cached, recomputed = (generate(decomposer, prompts, 12, push, temperature, seed=5, cached=way) for way in (True, False))
    assert torch.equal(cached, recomputed)
    assert not torch.equal(cached, generate(decomposer, prompts, 12, None, temperature, seed=5))


def test_without_an_intervention_it_is_the_target_and_greedy_is_its_argmax(lm, prompts):
    target, _ = lm
    text = generate(make("neurons", target), prompts, 10, temperature=0)
    whole = torch.cat([prompts, text], 1)
    logits = target(whole)[:, 7:-1]
    logits[..., 0] = -torch.inf
    assert torch.equal(logits.argmax(-1), text)


def test_draws_are_those_of_the_seed_and_never_special(lm, prompts):
    decomposer = make("transcoder", lm[0])
    idle = Intervention("scale", one("0", 1), 1.0)
    first, again, other = (generate(decomposer, prompts, 20, idle, 2.0, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, generate(decomposer, prompts, 20, None, 2.0, 1))
    assert not torch.equal(first, other)
    assert (first != 0).all()


def test_codes_that_need_other_positions_are_told_apart(lm, prompts):
    decomposer = make("transcoder", lm[0])
    plain = decomposer.encode

    def looks_back(inputs, gates=None):
        return plain({point: value.cumsum(-2) for point, value in inputs.items()}, gates)

    decomposer.encode = looks_back
    assert not is_positionwise(decomposer, prompts)


def test_likelihood_is_that_of_the_continuation_alone(lm, prompts):
    decomposer = make("neurons", lm[0])
    whole = generate(decomposer, prompts, 9, seed=3)
    logp = torch.log_softmax(lm[0](torch.cat([prompts, whole], 1)), -1)
    by_hand = [-np.mean([float(logp[i, 7 + t, whole[i, t]]) for t in range(9)]) for i in range(6)]
    np.testing.assert_allclose(continuation_nll(decomposer, prompts, whole).numpy(), by_hand, rtol=1e-5)


def test_loops_noise_and_overlikely_text_are_not_fluent():
    text, loop = np.arange(20), np.array([1, 2] * 10)
    natural = Natural(spread=0.5, lowest=1.0, distinct=1.0, repetition=0.0)
    assert distinct_share(loop, 2) == 2 / 19
    assert variety(text, natural) == 1
    assert variety(loop, natural) < 0.02
    same, worse, likelier = (fluency(np.array([nll]), np.array([2.0]), text[None], natural)[0] for nll in (2.0, 2.5, 0.5))
    assert (same, likelier) == (1, 0)
    assert worse == pytest.approx(np.exp(-1))
    assert fluency(np.array([0.5]), np.array([0.4]), text[None], natural)[0] > 0  # the unsteered text was as likely


def test_the_harmonic_mean_is_nought_where_one_score_is():
    np.testing.assert_allclose(harmonic(np.array([0.0, 0.5, 1.0]), np.array([1.0, 1.0, 1.0])), [0, 2 / 3, 1])
