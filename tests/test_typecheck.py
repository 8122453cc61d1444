"""The check of shapes is in force: a tensor of another shape than the annotation says is refused."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from decomp_bench.decomposer import Site, SiteCodes, Slot
from decomp_bench.interpretability.proxies import score
from decomp_bench.methods._sparse import Support, decode_at, support_of, top_of_batch
from decomp_bench.registry import suggest
from tests.typecheck import takes_arrays


def test_arguments_results_and_fields_of_another_shape_are_refused():
    with pytest.raises(TypeCheckError):
        top_of_batch(torch.ones(2, 3, 4), 1)
    with pytest.raises(TypeCheckError):
        SiteCodes(torch.ones(2, 3), torch.ones(2, 4))
    support = support_of(torch.tensor([[True, False], [True, True]]))
    assert decode_at(torch.ones(3), torch.ones(2, 5), support).shape == (2, 5)
    with pytest.raises(TypeCheckError):
        decode_at(torch.ones(3), torch.ones(2), support)


@pytest.mark.parametrize("made", [Support, SiteCodes, SiteCodes.value, decode_at, score])
def test_what_takes_arrays_is_checked(made):
    assert takes_arrays(made)


@pytest.mark.parametrize("made", [Site, Slot, Site.reads, suggest])
def test_what_takes_none_is_left_alone(made):
    assert not takes_arrays(made)
