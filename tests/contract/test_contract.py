"""What every registered method must satisfy, on a toy and on tiny language models of both shapes. A new method is picked up by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from decomp_bench import registry
from decomp_bench.conditions import upstream
from decomp_bench.config import EvalConfig, TrainConfig, parse
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Decomposer, SiteCodes
from decomp_bench.evaluate import evaluate
from decomp_bench.replacement import clean_codes, clean_points, clean_rows, replaced
from decomp_bench.train import Job, train

TARGETS = ["lm", "gated_lm", "toy"]
STEPS, FEWER = 40, 25
"""Of methods that train on activation rows, and of those that run the target in every step."""
TRANSFORMER = {"gate": "global_shared_transformer", "gate_width": 8, "gate_blocks": 1, "gate_heads": 2}
VARIANTS = {"spd of a global transformer": ("spd", TRANSFORMER), "spd of a global MLP": ("spd", {"gate": "global_shared_mlp"})}
"""Configs of a method that meet the contract differently: gates that read every map, and other positions."""


def make(name: str, target, layers=None, seed=0, **config) -> Decomposer:
    name, variant = VARIANTS.get(name, (name, {}))
    kind, config = registry.method(name), {**variant, **config}
    chosen = {**getattr(kind, "presets", {}).get("smoke", {}), **config}
    chosen = {key: value for key, value in chosen.items() if key in kind.Config.model_fields}
    if kind.trainable:
        sequences = kind.trained_on(parse(kind.Config, chosen, name)) == "sequences"
        chosen |= {"steps": FEWER if sequences else STEPS, "batch": 2 if sequences and target.is_lm else 128} | {
            k: v for k, v in config.items() if k == "steps"
        }
    layers = layers or tuple(range(target.layers))
    if (reason := kind.skip(target, layers)) is not None:
        pytest.skip(reason)
    return kind(parse(kind.Config, chosen, name), target, layers, seed)


def like(decomposer: Decomposer, target, seed=0, **changes) -> Decomposer:
    """An untrained one of the same kind and config, but for some changes."""
    return type(decomposer)(decomposer.config.model_copy(update=changes), target, decomposer.layers, seed)


def trained(decomposer: Decomposer, source, folder) -> Decomposer:
    """Trained to its end, with its losses in a file."""
    lines: list[dict] = []
    (outcome,) = train([Job(decomposer, folder, lines.append)], source, TrainConfig(log_every=5))
    assert outcome.error is None
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return decomposer.eval()


@pytest.fixture(params=TARGETS, scope="module")
def world(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def gates_of(decomposer) -> str:
    """Where a pass may take its gates from."""
    return "self" if upstream(decomposer) else "clean"


@pytest.fixture(params=[*registry.names(), *VARIANTS], scope="module")
def named(request: pytest.FixtureRequest) -> str:
    """A method's name, or that of a variant."""
    return request.param


@pytest.fixture(scope="module")
def one(named, world, tmp_path_factory):
    """(decomposer after a short training, source, batch with clean activations, its folder)"""
    target, source = world
    if named in VARIANTS and target.map_paths.keys() >= {"0.mlp.gate"}:
        pytest.skip("variants are run on one language model and on the toy")
    folder = tmp_path_factory.mktemp(named.replace(" ", "_"))
    decomposer = trained(make(named, target), source, folder)
    return decomposer, source, a_batch(decomposer, source), folder


def a_batch(decomposer, source, rows=6):
    return with_clean(source, source.batch("validation", np.arange(rows)), clean_points(decomposer))


def same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        for part in ("strength", "gate"):
            assert torch.allclose(getattr(first[name], part), getattr(second[name], part), atol=tolerance, rtol=tolerance), (name, part)


def test_shapes_dtypes_and_gates(one):
    decomposer, _, batch, _ = one
    codes = clean_codes(decomposer, batch)
    assert set(codes) == {site.name for site in decomposer.sites}
    for site in decomposer.sites:
        rows = clean_rows(decomposer, batch.clean[site.reads[0]]).shape[:-1]
        assert codes[site.name].strength.shape == codes[site.name].gate.shape == (*rows, site.n)
        assert codes[site.name].gate.dtype == torch.float32
        assert 0 <= codes[site.name].gate.min() <= codes[site.name].gate.max() <= 1
        assert decomposer.component_sizes(site) is not None
    out = decomposer.replaced(batch, gates=gates_of(decomposer))
    assert out.logits.shape == batch.logits.shape
    assert set(out.outputs) == set(decomposer.layers)
    assert out.logits.isfinite().all()


def test_codes_of_a_row_do_not_depend_on_other_rows(one):
    decomposer, source, batch, _ = one
    whole = clean_codes(decomposer, batch)
    for index in (0, 3):
        alone = clean_codes(decomposer, with_clean(source, source.batch("validation", np.array([index])), clean_points(decomposer)))
        for name, codes in alone.items():
            length = codes.gate.shape[1] if decomposer.target.is_lm else None
            part = whole[name].gate[index : index + 1, :length] if length else whole[name].gate[index : index + 1]
            assert torch.equal(part, codes.gate), name


def test_save_and_load_give_the_same_codes(one):
    decomposer, _, batch, folder = one
    loaded = Decomposer.load(folder / "checkpoint", decomposer.target)
    same(clean_codes(decomposer, batch), clean_codes(loaded, batch))


def test_codes_given_as_gates_return_themselves(one):
    decomposer, _, batch, _ = one
    inputs = {p: clean_rows(decomposer, batch.clean[p]) for p in decomposer.points() & batch.clean.keys()}
    codes = decomposer.encode(inputs)
    same(codes, decomposer.encode(inputs, codes))


def test_all_gates_zero_leaves_the_declared_constant(one):
    decomposer, _, batch, _ = one
    codes = clean_codes(decomposer, batch)
    inputs = {p: clean_rows(decomposer, batch.clean[p]) for p in decomposer.points() & batch.clean.keys()}
    off = {
        name: SiteCodes(c.strength, torch.zeros_like(c.gate), None if c.delta is None else torch.zeros_like(c.delta))
        for name, c in codes.items()
    }
    for write in {slot.write for site in decomposer.sites for slot in site.slots}:
        value = decomposer.decode(off, write, inputs).flatten(0, -2)
        if decomposer.constant_coefficients(write) == 0:
            assert torch.allclose(value, value[:1].expand_as(value), atol=1e-6), "what is always on may not depend on the input"
        if decomposer.constant_size(write) == 0:
            assert value.abs().max() == 0


def test_nothing_replaced_gives_the_clean_logits_bit_for_bit(one):
    decomposer, _, batch, _ = one
    assert torch.equal(replaced(decomposer, batch, ()).logits, batch.logits)


def test_one_layer_replaced_equals_splicing_by_hand(one):
    decomposer, _, batch, _ = one
    layer, target = decomposer.layers[-1], decomposer.target
    for protocol in ("cascading", "clean", "single"):
        out = replaced(decomposer, batch, (layer,), protocol, gates_of(decomposer))
        spliced = out.outputs[layer]
        hook = target.part(f"{layer}.mlp").register_forward_hook(
            lambda _m, _a, y, spliced=spliced: torch.cat([y[:, :1], spliced], 1) if target.keeps_first else spliced
        )
        by_hand = target(batch.x)
        hook.remove()
        assert torch.allclose(out.logits, by_hand, atol=1e-5), protocol


def test_single_and_clean_agree_on_a_layers_output(one):
    decomposer, _, batch, _ = one
    together = replaced(decomposer, batch, decomposer.layers, "clean", gates_of(decomposer)).outputs
    for layer in decomposer.layers:
        alone = replaced(decomposer, batch, (layer,), "single", gates_of(decomposer)).outputs[layer]
        assert torch.allclose(alone, together[layer], atol=1e-5)


def test_clean_gates_under_clean_inputs_change_nothing_where_gates_read_unit_inputs(one):
    decomposer, _, batch, _ = one
    if any(not p.endswith((".in", ".out")) for site in decomposer.sites for p in site.gates_from):
        pytest.skip("gates inside a unit")
    first, second = (replaced(decomposer, batch, decomposer.layers, "clean", gates) for gates in ("self", "clean"))
    assert torch.allclose(first.logits, second.logits, atol=1e-6)


def test_modules_are_restored_after_an_exception(one):
    decomposer, _, batch, _ = one
    before = list(decomposer.target.module.modules())

    def fail(_site, _codes):
        raise RuntimeError("edit")

    with pytest.raises(RuntimeError, match="edit"):
        replaced(decomposer, batch, decomposer.layers, gates=gates_of(decomposer), edit=fail)
    assert all(a is b for a, b in zip(before, decomposer.target.module.modules(), strict=True))


def test_an_edit_runs_once_for_each_site_in_execution_order_and_keep_error_cancels_without_one(one):
    decomposer, _, batch, _ = one
    seen: list[tuple[int, str]] = []

    def note(site, codes):
        seen.append((site.layer, site.name))
        return codes

    out = replaced(decomposer, batch, decomposer.layers, gates=gates_of(decomposer), edit=note, keep_error=True)
    assert sorted(name for _, name in seen) == sorted(site.name for site in decomposer.sites)
    assert [layer for layer, _ in seen] == sorted(layer for layer, _ in seen)
    assert torch.allclose(out.logits, batch.logits, atol=1e-4)


def test_accounting_is_the_sum_of_active_sizes(one):
    decomposer, source, _, _ = one
    config = EvalConfig(tokens=300, bootstrap=2, sweep=False, gates=(gates_of(decomposer),), protocols=("clean",))
    (found,) = evaluate([decomposer], source, config)
    first = found.rows[0]
    rows = [r for r in found.rows if r["applicable"] == "yes" and r["curve"] == first["curve"] and r["variant"] == first["variant"]]
    value = {(r["metric"], r["site"]): r["value"] for r in rows}
    expected = 0.0
    for site in decomposer.sites:
        size = decomposer.component_sizes(site)
        if isinstance(size, int):
            expected += value["l0_module", site.name] * size
        else:
            pytest.skip("sizes differ between components")
    expected += sum(decomposer.constant_size(w) for w in {slot.write for site in decomposer.sites for slot in site.slots})
    assert value["active_params", "all"] == pytest.approx(expected / len(decomposer.layers), rel=1e-6)


def test_loss_is_finite_and_falls(one):
    decomposer, _, _, folder = one
    if not decomposer.trainable:
        pytest.skip("nothing is trained")
    losses = [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == decomposer.config.steps // 5
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < losses[0]


def test_interrupted_resumed_and_looked_at_on_the_way_the_same_seed_gives_the_same_weights(one, world, tmp_path):
    decomposer, source, batch, _ = one
    if not decomposer.trainable:
        pytest.skip("nothing is trained")
    part = like(decomposer, world[0])
    with pytest.raises(KeyboardInterrupt):
        train([Job(part, tmp_path, _interrupt_at(10))], source, TrainConfig(log_every=5, save_every=10))
    torch.rand(7)  # the global generator is in another state: it must not matter
    resumed = like(decomposer, world[0])

    def evaluate_too(_line: dict) -> None:
        clean_codes(copy.copy(resumed).eval(), batch)
        resumed.train()

    (outcome,) = train([Job(resumed, tmp_path, evaluate_too)], source, TrainConfig(log_every=5), resume=True)
    assert outcome.steps == decomposer.config.steps
    for key, value in decomposer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def _interrupt_at(step: int):
    def log(line: dict) -> None:
        if line["step"] > step:
            raise KeyboardInterrupt

    return log


def test_every_declared_inference_choice_works(one):
    decomposer, _, batch, _ = one
    for choice in decomposer.sweep():
        view = decomposer.at(**vars(choice))
        assert replaced(view, batch, decomposer.layers, gates=gates_of(view)).logits.isfinite().all()
    if "k" in decomposer.swept:
        small, large = (sum(float(c.active.sum()) for c in clean_codes(decomposer.at(k=k), batch).values()) for k in (1, 4))
        assert small < large
    assert decomposer.choice == type(decomposer.choice)()


def test_encode_in_training_differs_by_selection_only(one):
    decomposer, _, batch, _ = one
    inputs = {p: clean_rows(decomposer, batch.clean[p]) for p in decomposer.points() & batch.clean.keys()}
    if decomposer.target.is_lm:
        inputs = {p: value.flatten(0, -2) for p, value in inputs.items()}
    evaluated = decomposer.encode(inputs)
    training = copy.copy(decomposer).train()
    codes = training.encode(inputs)
    decomposer.eval()
    for name in codes:
        both = codes[name].active & evaluated[name].active
        assert torch.allclose(codes[name].strength[both], evaluated[name].strength[both])
    assert replace(evaluated[name]) is not None
