"""Ours -> another tool's files -> ours: the same codes and outputs, and a refusal where a format has no room."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.errors import UserError
from decomp_bench.interop import FORMATS, format_named
from decomp_bench.interop._plain import as_decomposer, as_plain, dictionary, keep_thresholds
from decomp_bench.interop.importing import located
from decomp_bench.registry import method
from tests.interop.forward import K, activations, agree, ours, run, target

ABOUT = {"run": "a-run", "model": "a-model", "made_by": "decomp-bench"}
ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu"]
WRITTEN = {  # format -> method -> activations that it holds
    "saelens": {"sae": ACTIVATIONS, "transcoder": ["relu", "batchtopk", "jumprelu"]},
    "dictionary_learning": {"sae": ACTIVATIONS},
    "sparsify": {"sae": ["topk"], "transcoder": ["topk"]},
    "circuit-tracer": {"transcoder": ACTIVATIONS, "clt": ["relu", "batchtopk", "jumprelu"]},
    "npz": {"sae": ["relu", "batchtopk", "jumprelu"], "transcoder": ["relu", "batchtopk", "jumprelu"]},
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["sae", "transcoder", "clt"])
@pytest.mark.parametrize("form", WRITTEN)
def test_out_and_in_again_is_the_same_function(form, name, activation, tmp_path):
    """What a format cannot hold is refused in one line, with nothing written."""
    on, module = target(), FORMATS[form].load()
    before = ours(name, on, activation=activation)
    if activation not in WRITTEN[form].get(name, []):
        with pytest.raises(UserError) as refused:
            module.write(as_plain(before), tmp_path, ABOUT)
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.iterdir())
        return
    module.write(as_plain(before), tmp_path, ABOUT)
    coders, files = module.read(str(tmp_path))
    assert len(files) >= len(before.layers)
    after = as_decomposer(located(coders, None, ("out" if name == "sae" else "in") if form == "npz" else None), on)
    assert (after.name, after.layers) == (name, before.layers)
    inputs = activations(on)
    wanted, found = run(before, inputs), run(after, inputs)
    agree(found[0], wanted[0], 1e-6)
    agree(found[1], wanted[1], 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["sae", "transcoder", "clt"])
def test_plain_coders_are_the_decomposition(name, activation):
    on = target()
    before = ours(name, on, layers=(0, 2), activation=activation)
    after = as_decomposer(as_plain(before), on)
    assert (after.name, after.layers, after.config.activation) == (name, (0, 2), activation)
    inputs = activations(on)
    for found, wanted in zip(run(after, inputs), run(before, inputs), strict=True):
        agree(found, wanted, 1e-6)


def test_the_kind_of_dictionary_follows_from_what_it_reads_and_writes():
    assert [dictionary(end, across).name for end, across in (("out", False), ("in", False), ("in", True))] == ["sae", "transcoder", "clt"]
    with pytest.raises(UserError, match="no registered method"):
        dictionary("out", True)


@pytest.mark.parametrize("name", ["spd", "neurons", "svd"])
def test_methods_without_encoder_and_decoder_have_no_place_elsewhere(name, toy):
    on, _ = toy
    kind = method(name)
    with pytest.raises(UserError, match=f"{name} has no encoder and decoder"):
        as_plain(kind(kind.Config(), on, (0,)))


def test_circuit_tracer_needs_every_layer_from_the_first(tmp_path):
    with pytest.raises(UserError, match="every layer from 0 on"):
        FORMATS["circuit-tracer"].load().write(as_plain(ours("transcoder", target(), layers=(0, 2))), tmp_path, ABOUT)


def test_formats_by_name():
    assert format_named("sparsify", "import").writes
    with pytest.raises(UserError, match=r"did you mean 'sparsify'"):
        format_named("sparsifi", "import")
    with pytest.raises(UserError, match="no format 'nn_decompositions' to export"):
        format_named("nn_decompositions", "export")


def test_thresholds_of_zero_are_a_relu():
    on = target()
    coders = as_plain(ours("sae", on, layers=(1,), activation="relu"))
    coders[0].activation, coders[0].threshold = "jumprelu", torch.zeros(coders[0].n)
    inputs = activations(on)
    made = as_decomposer(coders, on)
    assert all(bool(value.isfinite().all()) for value in made.state_dict().values())
    agree(run(made, inputs)[0], run(ours("sae", on, layers=(1,), activation="relu"), inputs)[0], 1e-6)


def test_a_threshold_that_came_along_outlasts_a_calibration():
    """Calibrated thresholds serve other k; the trained k keeps the one that its tool saved."""
    on = target()
    coders = as_plain(ours("transcoder", on, activation="batchtopk"))
    made = as_decomposer(coders, on)
    made.coder(made.sites[0]).activation.table_threshold.fill_(9.0)
    keep_thresholds(made, coders)
    activation = made.coder(made.sites[0]).activation
    assert float(activation.threshold(K)) == float(coders[0].threshold[0])
    assert float(activation.threshold(2 * K)) == 9.0
