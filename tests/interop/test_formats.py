"""The other formats: layouts written by hand, and forwards written by hand from the tools' own definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from decomp_bench.errors import UserError
from decomp_bench.interop import circuit_tracer, dictionary_learning, nn_decompositions, npz, sparsify
from decomp_bench.interop._plain import as_decomposer
from decomp_bench.interop.importing import located
from tests.golden.recorded import Golden
from tests.interop.forward import WIDTH, K, N, agree, codes, generator, largest, outputs, rows, run, target


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.5 * torch.randn(*shape, generator=generator(seed))


def encoder(seed: int = 0):
    """W_enc [n, d], b_enc, W_dec [n, d], b_dec, threshold."""
    return (
        random(N, WIDTH, seed=seed),
        random(N, seed=seed + 1),
        random(N, WIDTH, seed=seed + 2),
        random(WIDTH, seed=seed + 3),
        random(N, seed=seed + 4).abs(),
    )


# ---- dictionary_learning


def trainer(folder, kind: str, weights: dict, **config):
    """A trainer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "ae.pt")
    known = {"dict_class": kind, "layer": 1, "submodule_name": "model.layers.1.mlp", **config}
    (folder / "config.json").write_text(json.dumps({"trainer": known, "buffer": {"io": "out"}}))
    return folder


def dictionary(kind: str, x: torch.Tensor):
    """State dict of a class, and the codes and reconstruction that the class computes."""
    W_enc, b_enc, W_dec, b_dec, threshold = encoder()
    linear = {"encoder.weight": W_enc, "decoder.weight": W_dec.T.contiguous()}
    pre = (x - b_dec) @ W_enc.T + b_enc
    if kind == "AutoEncoder":  # its loader gives decoder columns unit length
        lengths = W_dec.norm(dim=1)
        return {**linear, "encoder.bias": b_enc, "bias": b_dec}, pre.relu() * lengths, pre.relu() @ W_dec + b_dec
    if kind == "AutoEncoderNew":
        f = (x @ W_enc.T + b_enc).relu()
        return {**linear, "encoder.bias": b_enc, "decoder.bias": b_dec}, f, f @ W_dec + b_dec
    if kind == "JumpReluAutoEncoder":
        pre = x @ W_enc.T + b_enc
        f = (pre * (pre > threshold)).relu()
        return {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}, f, f @ W_dec + b_dec
    if kind == "GatedAutoEncoder":
        r_mag, mag_bias, inner = random(N, seed=8), random(N, seed=9), (x - b_dec) @ W_enc.T
        f = ((inner + b_enc) > 0) * (r_mag.exp() * inner + mag_bias).relu()
        return {**linear, "decoder_bias": b_dec, "gate_bias": b_enc, "r_mag": r_mag, "mag_bias": mag_bias}, f, f @ W_dec + b_dec
    counts = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    f = largest(pre.relu(), K) if kind == "AutoEncoderTopK" else pre.relu() * (pre > 0.6)
    if kind == "MatryoshkaBatchTopKSAE":
        own = {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "group_sizes": torch.tensor([4, N - 4])}
        return {**own, **counts}, f, f @ W_dec + b_dec
    return {**linear, "encoder.bias": b_enc, "b_dec": b_dec, **counts}, f, f @ W_dec + b_dec


@pytest.mark.parametrize("kind", dictionary_learning.NEEDED)
def test_dictionary_learning_classes_compute_what_they_compute_there(kind, tmp_path):
    x = rows()
    weights, f, y = dictionary(kind, x)
    trainer(tmp_path / "run" / "trainer_0", kind, weights, k=K)
    (coder,), _ = dictionary_learning.read(str(tmp_path / "run"))
    assert (coder.place.layer, coder.place.end) == (1, "out")
    agree([codes(coder, x)], [f], 1e-5)
    agree(outputs([coder], [x]), [y], 1e-5)
    if kind == "GatedAutoEncoder":
        return
    found = run(as_decomposer([coder], target()), {"1.mlp.out": x})
    agree(found[0], [f], 1e-5)
    agree(found[1], [y], 1e-5)


def test_a_threshold_that_was_never_set_is_no_threshold(tmp_path):
    weights, _, _ = dictionary("BatchTopKSAE", rows())
    trainer(tmp_path, "BatchTopKSAE", {**weights, "threshold": torch.tensor(-1.0)}, k=K)
    (coder,), _ = dictionary_learning.read(str(tmp_path))
    assert (coder.activation, coder.k, coder.threshold) == ("batchtopk", K, None)


def test_dictionary_learning_refusals(tmp_path):
    weights, _, _ = dictionary("AutoEncoder", rows())
    for changes, says in (
        ({"kind": "IdentityDict"}, "dictionary class 'IdentityDict' is not supported"),
        ({"submodule_name": "resid_post_layer_1"}, "residual stream"),
        ({"weights": {"bias": torch.zeros(WIDTH)}}, "lacks encoder.weight"),
    ):
        known = {"kind": "AutoEncoder", "weights": weights, **changes}
        trainer(tmp_path, known.pop("kind"), known.pop("weights"), **known)
        with pytest.raises(UserError, match=says):
            dictionary_learning.read(str(tmp_path))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    trainer(tmp_path, "AutoEncoder", {"bias": Trap()})
    with pytest.raises(UserError, match="more than tensors"):
        dictionary_learning.read(str(tmp_path))
    assert not (tmp_path / "trapped").exists()


# ---- sparsify


def hookpoint(folder, skip: bool = False, **config):
    """A hookpoint's folder, and (codes, output) of the tool's forward."""
    folder.mkdir(parents=True, exist_ok=True)
    W_enc, b_enc, W_dec, b_dec, _ = encoder()
    weights = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    W_skip = random(WIDTH, WIDTH, seed=11)
    save_file({**weights, "W_skip": W_skip} if skip else weights, folder / "sae.safetensors")
    config = {"activation": "topk", "num_latents": N, "k": K, "skip_connection": skip, "transcode": False, "d_in": WIDTH, **config}
    (folder / "cfg.json").write_text(json.dumps(config))

    def forward(x: torch.Tensor):
        f = largest(((x if config["transcode"] else x - b_dec) @ W_enc.T + b_enc).relu(), K)
        return f, f @ W_dec + b_dec + (x @ W_skip.T if skip else 0)

    return forward


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_hookpoints(transcode, skip, tmp_path):
    forward = hookpoint(tmp_path / "layers.1.mlp", skip, transcode=transcode)
    (coder,), used = sparsify.read(str(tmp_path / "layers.1.mlp"))
    x = rows()
    f, y = forward(x)
    assert (coder.place.layer, coder.place.end, len(used)) == (1, "in" if transcode else "out", 2)
    agree([codes(coder, x)], [f], 1e-5)
    agree(outputs([coder], [x]), [y], 1e-5)
    if not skip:
        found = run(as_decomposer([coder], target()), {"1.mlp.in": x, "1.mlp.out": x})
        agree(found[1], [y], 1e-5)


def test_a_whole_sparsify_run_is_one_decomposition(tmp_path):
    for layer in (10, 2, 0):
        hookpoint(tmp_path / "run" / f"model.layers.{layer}.mlp", transcode=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    coders, _ = sparsify.read(str(tmp_path / "run"))
    assert [coder.place.layer for coder in coders] == [0, 2, 10]
    assert as_decomposer(coders, target(layers=11)).layers == (0, 2, 10)


def test_sparsify_refusals(tmp_path):
    hookpoint(tmp_path / "layers.1")
    with pytest.raises(UserError, match="residual stream"):
        sparsify.read(str(tmp_path / "layers.1"))
    hookpoint(tmp_path / "layers.1.mlp", activation="relu")
    with pytest.raises(UserError, match="must be topk or groupmax"):
        sparsify.read(str(tmp_path / "layers.1.mlp"))


# ---- circuit-tracer


HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


@pytest.mark.parametrize("layout", ["relu", "turned", "jumprelu", "topk", "skip"])
@pytest.mark.parametrize("n", [N, WIDTH])
def test_circuit_tracer_sets_in_every_layout(layout, n, tmp_path):
    """Version 0.1 stored decoders as [d, n] and listed its files; a square one can only be told apart by that list."""
    xs, wanted, weights = [rows(layer) for layer in range(2)], [], []
    for layer, x in enumerate(xs):
        W_enc, b_enc, W_dec, b_dec, threshold = encoder(20 * layer)
        own = {"W_enc": W_enc[:n], "b_enc": b_enc[:n], "W_dec": W_dec[:n], "b_dec": b_dec}
        pre = x @ own["W_enc"].T + own["b_enc"]
        f = largest(pre, K) if layout == "topk" else pre * (pre > threshold[:n]) if layout == "jumprelu" else pre.relu()
        skip = random(WIDTH, WIDTH, seed=layer) if layout == "skip" else torch.zeros(WIDTH, WIDTH)
        wanted.append(f @ own["W_dec"] + b_dec + x @ skip.T)
        own |= {"activation_function.threshold": threshold[:n]} if layout == "jumprelu" else {}
        own |= {"W_skip": skip} if layout == "skip" else {}
        own |= {"W_dec": own["W_dec"].T} if layout == "turned" else {}
        weights.append({key: value.contiguous() for key, value in own.items()})
    config = {"model_name": "m", "model_kind": "transcoder_set", **HOOKS, **({"activation": "topk", "k": K} if layout == "topk" else {})}
    if layout == "turned":
        config["transcoders"] = [{"id": f"t{layer}", "layer": layer, "filepath": f"file_{layer}.safetensors"} for layer in range(2)]
    for layer, own in enumerate(weights):
        save_file(own, tmp_path / f"{'file' if layout == 'turned' else 'layer'}_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    coders, _ = circuit_tracer.read(str(tmp_path))
    assert [(coder.place.layer, coder.place.end) for coder in coders] == [(0, "in"), (1, "in")]
    agree([outputs([coder], [x])[0] for coder, x in zip(coders, xs, strict=True)], wanted, 1e-5)
    if layout != "skip":
        inputs = {f"{layer}.mlp.in": x for layer, x in enumerate(xs)}
        agree(run(as_decomposer(coders, target()), inputs)[1], wanted, 1e-5)


@pytest.mark.parametrize("jumps", [False, True])
def test_circuit_tracer_cross_layer_transcoders(jumps, tmp_path):
    layers, xs = 3, [rows(layer) for layer in range(3)]
    wanted = [random(WIDTH, seed=50 + layer).expand(len(xs[0]), -1) for layer in range(layers)]
    for i in range(layers):
        W_enc, b_enc, _, _, threshold = encoder(20 * i)
        W_dec = random(N, layers - i, WIDTH, seed=70 + i)
        own = {f"W_enc_{i}": W_enc, f"b_enc_{i}": b_enc, f"b_dec_{i}": random(WIDTH, seed=50 + i)}
        save_file({**own, f"threshold_{i}": threshold} if jumps else own, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": W_dec}, tmp_path / f"W_dec_{i}.safetensors")
        pre = xs[i] @ W_enc.T + b_enc
        f = pre * (pre > threshold) if jumps else pre.relu()
        for j in range(layers - i):
            wanted[i + j] = wanted[i + j] + f @ W_dec[:, j]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", **HOOKS}))
    coders, _ = circuit_tracer.read(str(tmp_path))
    decomposer = as_decomposer(coders, target())
    assert len(decomposer.sites[0].slots) == 3
    agree(run(decomposer, {f"{i}.mlp.in": x for i, x in enumerate(xs)})[1], wanted, 1e-5)
    with pytest.raises(UserError, match="every later layer"):
        as_decomposer(located(coders[:2], None, None), target())


def test_circuit_tracer_default_hooks_read_before_the_norm(tmp_path):
    W_enc, b_enc, W_dec, b_dec, _ = encoder()
    save_file({"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "feature_input_hook": "hook_resid_mid"}))
    with pytest.raises(UserError, match="before the MLP's norm"):
        circuit_tracer.read(str(tmp_path))


# ---- npz


@pytest.mark.parametrize("end", ["in", "out"])
def test_npz_needs_to_be_told_what_it_reads(end, tmp_path):
    W_enc, b_enc, W_dec, b_dec, threshold = encoder()
    folder = tmp_path / "layer_1" / "width_10" / "average_l0_3"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=W_enc.T.numpy(), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold)
    coders, _ = npz.read(str(folder / "params.npz"))
    with pytest.raises(UserError, match="--reads in"):
        located(coders, None, None)
    placed = located(coders, None, end)
    x = rows()
    pre = x @ W_enc.T + b_enc
    f = pre * (pre > threshold)
    found = run(as_decomposer(placed, target()), {f"1.mlp.{end}": x})
    agree(found[0], [f], 1e-5)
    agree(found[1], [f @ W_dec + b_dec], 1e-5)
    assert npz.read(str(tmp_path))[0][0].place.layer == 1
    np.savez(tmp_path / "negative.npz", W_enc=W_enc.T.numpy(), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=-threshold)
    with pytest.raises(UserError, match="below zero"):
        npz.read(str(tmp_path / "negative.npz"))


# ---- nn_decompositions, against recorded numbers


def reference(case: str, folder) -> Golden:
    """A recorded case as the checkpoint folder that the reference writes."""
    golden = Golden(f"nnd_{case}")
    weights = {key.removeprefix("param."): value for key, value in golden.tensors.items() if key.startswith("param.")}
    torch.save(weights, folder / "encoder.pt")
    about = golden.about
    config = {"input_size": about["d_in"], "output_size": about["d_out"], **about}
    config |= {"layers": str(list(range(about["n_layers"])))} if "n_layers" in about else {}
    (folder / "config.json").write_text(json.dumps(config))
    return golden


@pytest.mark.parametrize("case", ["vanilla", "topk_nodead", "jumprelu"])
def test_nn_decompositions_transcoders_as_recorded(case, tmp_path):
    golden = reference(f"transcoder_{case}", tmp_path)
    (coder,), _ = nn_decompositions.read(str(tmp_path))
    golden.agrees("out.feature_acts", codes(coder, golden["in.x"]))
    golden.agrees("out.output", outputs([coder], [golden["in.x"]])[0])
    with pytest.raises(UserError, match="--layers"):
        located([coder], None, None)


def test_nn_decompositions_batchtopk_has_k_and_no_threshold(tmp_path):
    golden = reference("transcoder_batchtopk_dead", tmp_path)
    (coder,), _ = nn_decompositions.read(str(tmp_path))
    assert (coder.activation, coder.k, coder.threshold) == ("batchtopk", 2, None)
    golden.agrees("out.acts_dense", codes(coder, golden["in.x"]))


@pytest.mark.parametrize("case", ["vanilla", "jumprelu", "topk_dead"])
def test_nn_decompositions_cross_layer_transcoders_as_recorded(case, tmp_path):
    golden = reference(f"clt_{case}", tmp_path)
    coders, _ = nn_decompositions.read(str(tmp_path))
    assert [coder.place.layer for coder in coders] == [0, 1, 2]
    xs = [golden[f"in.x.{i}"] for i in range(3)]
    golden.agrees("out.feature_acts", torch.cat([codes(coder, x) for coder, x in zip(coders, xs, strict=True)], 1))
    for i, y in enumerate(outputs(coders, xs)):
        golden.agrees(f"out.output.{i}", y)


def test_nn_decompositions_options_that_fixed_weights_cannot_have(tmp_path):
    reference("transcoder_topk_square_preencbias_unitnorm", tmp_path)
    with pytest.raises(UserError, match="input_unit_norm"):
        nn_decompositions.read(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "input_unit_norm": False}))
    (coder,), _ = nn_decompositions.read(str(tmp_path))
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    pre = ((rows() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    agree([codes(coder, rows())], [largest(pre, 3)], 1e-5)
