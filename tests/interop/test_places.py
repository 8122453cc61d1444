"""Where coders belong: names of other tools, the norm's gain, and coders that are no decomposition together."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.errors import UserError
from decomp_bench.interop import sparsify
from decomp_bench.interop._places import between, gain, place
from decomp_bench.interop._plain import Plain, as_decomposer
from decomp_bench.interop.importing import located
from tests.interop.forward import K, N, agree, codes, run, target
from tests.interop.test_formats import hookpoint, random


@pytest.mark.parametrize(
    ("name", "side", "layer", "end"),
    [
        ("blocks.3.hook_mlp_out", "out", 3, "out"),
        ("blocks.3.mlp.hook_out", "out", 3, "out"),
        ("blocks.3.mlp.hook_in", "in", 3, "in"),
        ("blocks.3.ln2.hook_normalized", "in", 3, "in"),
        ("model.layers.3.mlp", "in", 3, "in"),
        ("model.layers.3.mlp", "out", 3, "out"),
        ("transformer.h.3.mlp", "out", 3, "out"),
        ("h.3.mlp", "in", 3, "in"),
        ("layers.12.mlp", "out", 12, "out"),
        ("h.3.rms_2", "in", 3, "in"),
        ("something.else", "out", None, None),
    ],
)
def test_places_by_their_names(name, side, layer, end):
    found = place(name, side)
    assert (found.layer, found.end) == (layer, end)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.3.hook_resid_mid", "before the MLP's norm"),
        ("blocks.3.hook_mlp_in", "before the MLP's norm"),
        ("blocks.3.hook_resid_post", "residual stream"),
        ("blocks.3.hook_resid_pre", "residual stream"),
        ("model.layers.3", "residual stream"),
        ("blocks.3.attn.hook_z", "attention"),
        ("blocks.3.hook_attn_out", "attention"),
        ("model.layers.3.self_attn", "attention"),
    ],
)
def test_places_that_have_no_replacement_say_why(name, says):
    with pytest.raises(UserError, match=says):
        between(name, name)


def test_a_coder_of_the_norm_before_its_gain_is_one_of_what_the_mlp_reads(lm):
    """The gain of the norm is folded into the encoder: codes on the MLP's input are those on the input divided by the gain."""
    on, _ = lm
    norm = on.module.get_submodule("model.layers.1.post_attention_layernorm")
    before = norm.weight.detach().clone()
    norm.weight.data = before * torch.linspace(0.5, 2, on.width)
    try:
        weight, bias = gain(on, 1)
        x = torch.tensor([[0, 5, 9, 3]])
        found, _ = on.clean(x, ["1.mlp.in", "1.resid"])
        assert weight.std() > 0.1
        assert not bias.any()
        coder = Plain(
            random(N, on.width), random(N), random(N, 1, on.width), random(on.width), place=place("blocks.1.ln2.hook_normalized", "in")
        )
        read = found["1.mlp.in"]
        agree(run(as_decomposer([coder], on), {"1.mlp.in": read})[0], [codes(coder, read / weight)], 1e-5)
    finally:
        norm.weight.data = before


# ---- what does not fit together


def test_coders_that_are_no_decomposition_together(tmp_path):
    for layer, k in ((0, K), (1, K + 1)):
        hookpoint(tmp_path / f"layers.{layer}.mlp", k=k)
    coders, _ = sparsify.read(str(tmp_path))
    with pytest.raises(UserError, match="differ in k"):
        as_decomposer(coders, target())
    with pytest.raises(UserError, match="same layer"):
        as_decomposer([coders[0], coders[0]], target())
    with pytest.raises(UserError, match="whose width is 7"):
        as_decomposer(coders[:1], target(7))
    with pytest.raises(UserError, match="has layers 0 to 0"):
        as_decomposer(coders[1:], target(layers=1))
    with pytest.raises(UserError, match="--layers names 1 layers"):
        located(coders, (1,), None)
    assert [coder.layer for coder in located(coders, (2, 1), None)] == [2, 1]
