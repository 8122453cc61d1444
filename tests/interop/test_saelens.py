"""sae-lens: what the library saves is read as the function that the library computes, and what we write it loads as ours."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from decomp_bench.errors import UserError
from decomp_bench.interop import saelens
from decomp_bench.interop._plain import as_decomposer, as_plain
from decomp_bench.registry import method
from tests.golden.recorded import Golden
from tests.interop.forward import WIDTH, K, N, activations, agree, codes, generator, ours, outputs, rows, run, target

HOOK, HOOK_IN = "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in"
ABOUT = {"run": "r", "model": "m", "made_by": "decomp-bench"}


def randomise(sae):
    g = generator(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
            if "threshold" in name:
                parameter.abs_()
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
    return sae.eval()


def made(architecture: str, **config):
    """An SAE of the library with random weights."""
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    trains = "batchtopk" in architecture
    kind, config_kind = (get_sae_training_class if trains else get_sae_class)(architecture)
    apart = "transcoder" in architecture
    sizes = {"d_in": WIDTH, "d_sae": N, **({"d_out": WIDTH, "apply_b_dec_to_input": False} if apart else {})}
    sae = kind(config_kind(**sizes, **config))
    hooks = {"hook_name": HOOK_IN, "hook_name_out": HOOK} if apart else {"hook_name": HOOK}
    sae.cfg.metadata = SAEMetadata(**hooks)
    return randomise(sae)


CASES = {
    "standard": {},
    "standard without input bias": {"apply_b_dec_to_input": False},
    "topk": {"k": K},
    "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "batchtopk": {"k": K, "rescale_acts_by_decoder_norm": False},
    "batchtopk rescaled": {"k": 2.5, "rescale_acts_by_decoder_norm": True},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [4, N]},
    "transcoder": {},
    "skip_transcoder": {},
    "jumprelu_transcoder": {},
    "jumprelu_skip_transcoder": {},
}


def unsupported(coder) -> str:
    """What our methods lack for a coder, in the words of the refusal; empty where they have it."""
    fields = method("sae").Config.model_fields
    if coder.activation not in get_args(fields["activation"].annotation):
        return f"activation '{coder.activation}' is not supported"
    return "skip connection is not supported" if coder.W_skip is not None and "skip" not in fields else ""


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_saves_is_read_as_its_own_function(case, tmp_path):
    """A batchtopk SAE goes through the library's export for inference, where it is a jumprelu one."""
    from sae_lens import SAE

    sae = made(case.split()[0], **CASES[case])
    save = getattr(sae, "save_inference_model", sae.save_model)
    save(tmp_path / "sae")
    theirs, x = SAE.load_from_disk(tmp_path / "sae"), rows()
    with torch.no_grad():
        wanted = [theirs.encode(x)], [theirs(x)]
    (coder,), used = saelens.read(str(tmp_path / "sae"))
    assert len(used) == 2
    agree([codes(coder, x)], wanted[0], 1e-5)
    agree(outputs([coder], [x]), wanted[1], 1e-5)
    assert (coder.place.layer, coder.place.end) == (1, "in" if "transcoder" in case else "out")
    lacking = unsupported(coder)
    if lacking:
        with pytest.raises(UserError, match=lacking):
            as_decomposer([coder], target())
        return
    decomposer = as_decomposer([coder], target())
    assert decomposer.kind == ("replacement" if "transcoder" in case else "autoencoding")
    found = run(decomposer, {"1.mlp.in": x, "1.mlp.out": x})
    agree(found[0], wanted[0], 1e-5)
    agree(found[1], wanted[1], 1e-5)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_batchtopk_checkpoint_of_training_is_its_export_for_inference(rescaled, tmp_path):
    sae = made("batchtopk", k=K, rescale_acts_by_decoder_norm=rescaled)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    ((checkpoint,), _), ((exported,), _) = (saelens.read(str(tmp_path / name)) for name in ("training", "inference"))
    assert (checkpoint.activation, checkpoint.k, exported.activation) == ("batchtopk", K, "jumprelu")
    agree([codes(checkpoint, rows())], [codes(exported, rows())], 1e-5)
    found, _ = run(as_decomposer([checkpoint], target()), {"1.mlp.out": rows()})
    agree(found, [codes(exported, rows())], 1e-5)


def test_a_training_checkpoint_with_a_scale_of_its_own_is_folded_as_the_library_does(tmp_path):
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = {"d_in": WIDTH, "d_sae": N, "k": K, "normalize_activations": "expected_average_only_in", "rescale_acts_by_decoder_norm": True}
    sae = randomise(TopKTrainingSAE(TopKTrainingSAEConfig(**config)))
    sae.cfg.metadata.hook_name = HOOK
    sae.save_model(tmp_path)
    with pytest.raises(UserError, match="scaled inputs"):
        saelens.read(str(tmp_path))
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    (coder,), _ = saelens.read(str(tmp_path))
    sae.fold_activation_norm_scaling_factor(2.5)
    with torch.no_grad():
        agree([codes(coder, rows())], [sae.encode(rows())], 1e-5)
        agree(outputs([coder], [rows()]), [sae(rows())], 1e-5)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_the_layout_of_version_5_is_read_as_the_library_reads_it(architecture, tmp_path):
    from sae_lens import SAE

    sae = made(architecture, **({"k": K} if architecture == "topk" else {}))
    save_file({key: value.detach() for key, value in sae.state_dict().items()}, tmp_path / "sae_weights.safetensors")
    flat = {"d_in": WIDTH, "d_sae": N, "hook_name": HOOK, "hook_layer": 1, "model_name": "gpt2", "dtype": "float32", "device": "cpu"}
    flat |= {"architecture": "standard" if architecture == "topk" else architecture, "apply_b_dec_to_input": True}
    flat |= {
        "activation_fn_str": "topk" if architecture == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if architecture == "topk" else {},
    }
    flat |= {"normalize_activations": "none", "finetuning_scaling_factor": False, "context_size": 128, "prepend_bos": True}
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    (coder,), _ = saelens.read(str(tmp_path))
    theirs = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        agree([codes(coder, rows())], [theirs.encode(rows())], 1e-5)
        agree(outputs([coder], [rows()]), [theirs(rows())], 1e-5)


def written(**changes):
    """A configuration as the library writes it, with changes."""
    config = {"architecture": "standard", "d_in": WIDTH, "d_sae": N, "apply_b_dec_to_input": True, "normalize_activations": "none"}
    return {**config, "metadata": {"hook_name": HOOK}, **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "matching_pursuit"}, "architecture 'matching_pursuit' is not supported"),
        ({"normalize_activations": "layer_norm"}, "each row by its own mean"),
        ({"normalize_activations": "constant_norm_rescale"}, "each row to one length"),
        ({"normalize_activations": "expected_average_only_in"}, "the scale is not there"),
        ({"reshape_activations": "hook_z"}, "attention"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu'"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post"}}, "residual stream"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_in"}}, "before the MLP's norm"),
        ({"metadata": {"hook_name": "blocks.1.mlp.hook_in"}}, "what an MLP reads"),
        (
            {"metadata": {"hook_name": HOOK_IN, "hook_name_out": "blocks.2.hook_mlp_out"}, "d_out": WIDTH},
            "reads at layer 1 and writes at 2",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_line(changes, says, tmp_path):
    made("standard").save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(written(**changes)))
    with pytest.raises(UserError, match=says) as refused:
        saelens.read(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no folder or file"):
        saelens.read(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"no cfg.json"):
        saelens.read(str(tmp_path))
    made("standard").save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="is broken"):
        saelens.read(str(tmp_path))
    save_file({"W_enc": torch.zeros(WIDTH, N)}, weights)
    with pytest.raises(UserError, match="lacks W_dec, b_dec, b_enc"):
        saelens.read(str(tmp_path))
    save_file(
        {"W_enc": torch.zeros(WIDTH, N), "b_enc": torch.zeros(N + 1), "W_dec": torch.zeros(N, WIDTH), "b_dec": torch.zeros(WIDTH)}, weights
    )
    with pytest.raises(UserError, match="do not fit together"):
        saelens.read(str(tmp_path))


def test_a_release_needs_the_hub():
    with pytest.raises(UserError, match="without network give a local folder"):
        saelens.read("no-such-release:layer_1")


@pytest.mark.parametrize("name", ["sae", "transcoder"])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_the_library_loads_what_we_write(name, activation, tmp_path):
    from sae_lens import SAE

    on = target()
    decomposer = ours(name, on, layers=(0, 2), activation=activation)
    if (name, activation) == ("transcoder", "topk"):
        with pytest.raises(UserError, match="no transcoder with topk"):
            saelens.write(as_plain(decomposer), tmp_path, ABOUT)
        assert not list(tmp_path.iterdir())
        return
    paths = saelens.write(as_plain(decomposer), tmp_path, ABOUT)
    inputs = activations(on)
    mine, theirs = run(decomposer, inputs), ([], [])
    with torch.no_grad():
        for path, site in zip(paths, decomposer.sites, strict=True):
            sae = SAE.load_from_disk(path)
            assert sae.cfg.metadata.hook_name.startswith(f"blocks.{site.layer}.")
            theirs[0].append(sae.encode(inputs[site.reads[0]]))
            theirs[1].append(sae(inputs[site.reads[0]]))
    agree(mine[0], theirs[0], 1e-5)
    agree(mine[1], theirs[1], 1e-5)


def test_a_cross_layer_transcoder_has_no_place_in_sae_lens(tmp_path):
    with pytest.raises(UserError, match="no cross-layer transcoder"):
        saelens.write(as_plain(ours("clt", target())), tmp_path, ABOUT)


@pytest.mark.parametrize("case", ["batchtopk", "topk", "matryoshka"])
def test_recorded_exports_of_the_library_are_read_as_recorded(case, tmp_path):
    """Inference weights and configs recorded from sae-lens, and the codes and reconstructions that it computed with them."""
    golden = Golden(f"sae_saelens_{case}")
    variants = {key.split(".")[1] for key in golden.tensors if ".export." in key and key.startswith("out.")}
    assert variants
    for variant in variants:
        prefix = f"out.{variant}.export."
        weights = {key.removeprefix(prefix): value.contiguous() for key, value in golden.tensors.items() if key.startswith(prefix)}
        config = golden.about["exported_inference_config"][variant]
        folder = tmp_path / variant
        folder.mkdir()
        save_file(weights, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps({**config, "metadata": {"hook_name": HOOK}}))
        (coder,), _ = saelens.read(str(folder))
        for name in ("x", "x_extra0"):
            found, written = run(as_decomposer([coder], target()), {"1.mlp.out": golden[f"in.{name}"]})
            golden.agrees(f"out.{variant}.infer.{name}.feature_acts", found[0])
            golden.agrees(f"out.{variant}.infer.{name}.recon", written[0])
