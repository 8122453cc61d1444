"""Toy targets with a known truth: the recorded reference weights, the gate, the cache, and the truths themselves."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from decomp_bench import data, targets
from decomp_bench.config import DataConfig
from decomp_bench.decomposer import Batch, Decomposer, Site, SiteCodes, Slot
from decomp_bench.errors import UserError
from decomp_bench.targets.toys import TOYS, library
from decomp_bench.targets.toys.hierarchy import Hierarchy
from decomp_bench.targets.toys.induction import Induction
from decomp_bench.targets.toys.resid import Resid
from decomp_bench.targets.toys.tms import TMS, tms_target
from decomp_bench.targets.toys.two_hop import TwoHop
from tests.golden.recorded import Golden

QUIET = lambda _done, _steps: None


def recorded(seed: int, identity: bool = False):
    """A target from the reference's weights of TMS 5-2."""
    golden = Golden("tms_truth")
    return tms_target(golden[f"target.s{seed}.linear1.weight"], golden[f"target.s{seed}.linear2.bias"], "toy:tms_5-2", identity)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("seed", [4, 7])
def test_reference_weights_give_the_reference_output_with_and_without_the_identity(seed, identity):
    golden = Golden("tms_truth")
    golden.agrees(f"out.s{seed}.model_output", recorded(seed, identity)(golden["in.x"]))


def test_the_drawn_data_have_the_reference_error():
    """Over 300 thousand rows, against the error that was measured over 20 million: five standard errors of the sample."""
    golden, target = Golden("tms_truth"), recorded(4)
    x = target.toy.draw(300_000, torch.Generator().manual_seed(0))
    error = (target(x) - x).double().square().mean(1)
    assert abs(float(error.mean()) - float(golden["f64.out.s4.eval_mse_20M_samples"])) < 5 * float(error.std()) / 300_000**0.5
    assert float((x > 0).double().mean()) == pytest.approx(0.05, abs=0.001)


def test_gradients_without_the_empty_rows_are_those_of_the_whole_batch():
    recipe, generator = TMS(5, 2, batch=64, bias_zero=False), torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 5, generator=generator), 0.3 * torch.randn(5, generator=generator)
    (x,) = recipe._rows(1, generator)
    whole = torch.cat([x, torch.zeros(64 - len(x), 5)])
    first, second, b = weight.clone().requires_grad_(), weight.T.clone().requires_grad_(), bias.clone().requires_grad_()
    (torch.relu(whole @ first.T @ second.T + b) - whole).square().mean().backward()
    expected = torch.cat([first.grad.flatten(), second.grad.T.flatten(), b.grad])
    assert torch.allclose(recipe._gradient(x, weight, bias), expected, atol=1e-7)
    assert 0 < len(x) < 64


def test_the_update_is_two_steps_of_adamw_on_shared_memory():
    recipe, generator = TMS(3, 2, batch=8, bias_zero=True, lr=0.01, weight_decay=0.1), torch.Generator().manual_seed(0)
    weight, bias, moments = torch.randn(2, 3, generator=generator), torch.zeros(3), torch.zeros(2, 15)
    first = torch.nn.Parameter(weight.clone())
    second, b = torch.nn.Parameter(torch.empty(3, 2)), torch.nn.Parameter(bias.clone())
    second.data = first.data.T
    optimiser = torch.optim.AdamW([first, second, b], lr=0.01, weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        gradient = torch.randn(15, generator=generator)
        first.grad, second.grad, b.grad = gradient[:6].view(2, 3).clone(), gradient[6:12].view(2, 3).T.clone(), gradient[12:].clone()
        optimiser.step()
        recipe._update(weight, bias, gradient, moments, step)
    assert torch.allclose(weight, first.detach(), atol=1e-4)  # the second update shrinks the first one's move by lr times decay
    assert torch.allclose(bias, b.detach(), atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_residual_mlp_is_trained_on_the_function_that_it_computes(layers):
    recipe = Resid(12, layers, 4, steps=3, width=20)
    weights, figures = recipe.train(0, QUIET)
    target = recipe.build(weights, "toy:x", "cpu")
    x = target.toy.draw(64, torch.Generator().manual_seed(1))
    inside = recipe._output(x, weights, weights["embed"] @ weights["embed"].T)
    assert torch.allclose(target(x), inside, atol=1e-5)
    unit = torch.eye(12)
    relu = (target(unit) + target(-unit)).diagonal()
    assert float(relu.min()) == pytest.approx(figures["smallest_relu"], abs=1e-5)


def test_mechanisms_of_a_map_add_up_to_it():
    """What reads features, or writes them, is the sum of its rank-one mechanisms on everything that the data can reach."""
    for target in (recorded(4), _two_hop(steps=2)):
        for (read, write), known in target.toy.truth.mechanisms.items():
            if read != write or read not in target.map_paths:
                continue
            weight = target.weight(read)
            dual = torch.linalg.pinv(known.basis).T
            whole = known.vectors.T @ dual if known.side == "read" else dual.T @ known.vectors
            assert torch.allclose(whole, weight, atol=1e-5), read


def _two_hop(**changes):
    recipe = dataclasses.replace(TwoHop(), **changes)
    return recipe.build(recipe.train(0, QUIET)[0], "toy:two_hop", "cpu")


def test_the_second_hop_reads_nothing_but_the_variables():
    target = _two_hop(steps=5)
    module = target.module
    blind = torch.cat([module.embed, module.read[10:]])
    assert float((target.weight("1.mlp.up") @ blind.T).abs().max()) < 1e-5
    assert float((target.weight("0.mlp.up") @ module.read.T).abs().max()) < 1e-5
    assert float((module.read[10:] @ target.weight("0.mlp.down")).abs().max()) < 1e-5


def test_the_two_hop_task_is_learnt_and_its_edges_are_those_of_the_task():
    recipe = dataclasses.replace(TwoHop(), steps=1000)
    weights, figures = recipe.train(0, QUIET)
    assert figures["accepted"]
    target = recipe.build(weights, "toy:two_hop", "cpu")
    x = target.toy.draw(500, torch.Generator().manual_seed(3))
    m = x.abs()
    edges = target.toy.truth.hop.edges
    expected = torch.stack([(m[:, a] - m[:, b]).abs() for a, b in (edges[:, j].nonzero().flatten().tolist() for j in range(10))], 1)
    y = target(x)
    assert float((y[:, :10] - m).square().mean()) < 1e-3
    assert float((y[:, 10:] - expected).square().mean()) < 1e-3


def test_a_child_is_never_on_without_its_parent_and_every_feature_is_put_out():
    recipe = dataclasses.replace(Hierarchy(), steps=300)
    weights, figures = recipe.train(0, QUIET)
    assert figures["accepted"]
    assert figures["largest_cosine"] < 0.35
    target = recipe.build(weights, "toy:hierarchy", "cpu")
    parent = target.toy.truth.parent
    x = target.toy.draw(20_000, torch.Generator().manual_seed(0))
    children = parent >= 0
    assert (x[:, children] > 0).sum() > 500
    assert not ((x[:, children] > 0) & (x[:, parent[children]] == 0)).any()
    assert ((x[:, children] > 0).float().unflatten(1, (6, 3)).sum(2) <= 1).all()


def test_the_induction_task_and_the_model_at_some_places():
    recipe = dataclasses.replace(Induction(), steps=2, batch=8)
    x = recipe.draw(200, torch.Generator().manual_seed(0))
    marker = recipe.tokens + 1
    assert (x == marker).sum(1).eq(2).all()
    first = (x == marker).float().argmax(1)
    assert torch.equal(x[:, -1], x.gather(1, first[:, None] + 1)[:, 0])
    assert (x[:, 0] == 0).all()
    assert (x[:, -2] == marker).all()
    weights, figures = recipe.train(0, QUIET)
    assert not figures["accepted"]
    target = recipe.build(weights, "toy:ih", "cpu")
    query = torch.randint(0, 65, (200, 3), generator=torch.Generator().manual_seed(1))
    whole = target(x)
    assert torch.allclose(target.module.at(x, query), whole.gather(1, query[:, :, None].expand(-1, -1, 130)), atol=1e-5)


def test_rows_of_tokens_are_a_source_without_a_tokenizer():
    recipe = dataclasses.replace(Induction(), steps=1, batch=2)
    target = recipe.build(recipe.train(0, QUIET)[0], "toy:ih@0", "cpu")
    source = data.source(target, DataConfig())
    batch = source.batch("test", np.arange(4))
    assert batch.x.shape == (4, 65)
    assert not torch.equal(batch.x, source.batch("validation", np.arange(4)).x)
    assert source.size("train") == 8 * source.size("test")
    with pytest.raises(UserError, match="has its own data"):
        data.source(target, DataConfig(source="x.txt"))


def test_attention_maps_of_the_induction_model_can_be_replaced_and_an_empty_mlp_cannot():
    from decomp_bench import registry
    from decomp_bench.replacement import replaced
    from tests.planted import make

    recipe = dataclasses.replace(Induction(), steps=1, batch=2)
    target = recipe.build(recipe.train(0, QUIET)[0], "toy:ih@0", "cpu")
    assert "no MLP" in registry.method("sae").skip(target, (0, 1))

    class Own(Decomposer):
        """Every attention map, decomposed into the rows of its own weight, halved where asked."""

        name, trainable, share = "own", False, 1.0

        def build(self, generator):
            self.own = {point: target.weight(point) for point in target.map_paths}
            for point in self.own:
                layer = int(point[0])
                self.sites.append(Site(point, layer, (point,), (Slot(point, point),), 16))

        def encode(self, inputs, gates=None):
            found = {p: inputs[p] @ w.T for p, w in self.own.items() if p in inputs}
            return {p: SiteCodes(value, torch.full_like(value, self.share)) for p, value in found.items()}

        def decode(self, codes, write, inputs):
            return codes[write].value

    whole = make(Own, target)
    assert len(whole.sites) == 8
    x = target.toy.draw(3, torch.Generator().manual_seed(0))
    assert torch.allclose(replaced(whole, Batch(x), (0, 1)).logits, target(x), atol=1e-5)
    whole.share = 0.5
    assert not torch.allclose(replaced(whole, Batch(x), (0, 1)).logits, target(x), atol=1e-2)


def test_rows_of_a_toy_depend_on_their_index_alone():
    target = recorded(4)
    source = data.source(target, DataConfig())
    index = np.array([130, 5, 5, 64])
    some, all_ = source.batch("train", index).x, source.batch("train", np.arange(200)).x
    assert torch.equal(some, all_[index])
    other = tms_target(*(torch.ones(2, 5), torch.zeros(5)), "toy:tms_5-2@1")
    assert data.source(other, DataConfig()).hash == source.hash


@pytest.fixture
def quick(monkeypatch):
    """The library with a 5-2 that is trained in no time: seed 1 comes out without features."""

    class Quick(TMS):
        def train(self, seed, progress):
            progress(1, 1)
            trained.append(seed)
            return {"weight": torch.full((2, 5), float(seed != 1)), "bias": torch.zeros(5)}, {
                "represented": 5 * (seed != 1), "features": 5, "smallest_norm": 1.0, "accepted": seed != 1}  # fmt: skip

    trained: list[int] = []
    monkeypatch.setitem(library.RECIPES, "tms_5-2", Quick(5, 2, 1024, False, steps=17))
    monkeypatch.setitem(TOYS, "tms_5-2", dataclasses.replace(TOYS["tms_5-2"], seeds=(3,)))
    return trained


def test_a_toy_is_trained_once_and_a_rejected_seed_says_which_ones_do(quick):
    first, again = targets.load("toy:tms_5-2@4"), targets.load("toy:tms_5-2@4")
    assert quick == [4]
    assert first.identity == again.identity
    assert library.accepted_seeds("tms_5-2") == (3, 4)
    assert targets.load("toy:tms_5-2").about["seed"] == 3
    with pytest.raises(UserError, match=r"represents 0 of 5 features.*toy:tms_5-2@3, toy:tms_5-2@4.*target train") as caught:
        targets.load("toy:tms_5-2@1")
    assert "\n" not in str(caught.value)
    assert quick == [4, 3, 1]
    with_identity = targets.load("toy:tms_5-2-id")
    assert with_identity.maps(0) == ["0.mlp.up", "0.mlp.hidden", "0.mlp.down"]
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(with_identity(x), targets.load("toy:tms_5-2")(x))
    folder, manifest = library.train_toy("tms_5-2", 1)
    assert quick == [4, 3, 1]
    assert manifest["accepted"] is False
    assert manifest["figures"]["represented"] == 0
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    (folder / "weights.safetensors").write_bytes(b"broken")
    library.train_toy("tms_5-2", 1)
    assert quick == [4, 3, 1, 1]


def test_the_command_trains_a_toy_and_says_what_the_gate_found(quick, capsys):
    from decomp_bench.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["target", "train", "toy:tms_5-2-id@6"])
    assert not ended.value.code
    assert "accepted: True" in (printed := capsys.readouterr().out)
    assert "--target toy:tms_5-2-id@6" in printed
    for arguments, code, words in (
        (["toy:tms_5-2@1"], 1, "represents 0 of 5 features"),
        (["toy:tms_5-2@4", "--seed", "2"], 2, "by name alone"),
        (["toy:resid_mlp1"], 2, "trained afresh"),
        (["toy:tms_9"], 2, "unknown toy"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["target", "train", *arguments])
        assert ended.value.code == code
        assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert quick[0] == 6


def test_every_listed_toy_has_a_recipe_and_bad_names_say_so():
    assert TOYS.keys() == library.RECIPES.keys()
    listed = {row["uri"] for row in targets.known()}
    assert {f"toy:{name}@SEED" for name in TOYS} <= listed
    for uri in ("toy:tms_5-3", "toy:tms_5-2@x"):
        with pytest.raises(UserError, match="unknown toy"):
            targets.load(uri)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOYS))
def test_the_seeds_on_record_are_accepted(name):
    folder, manifest = library.train_toy(name, TOYS[name].seeds[0])
    assert manifest["accepted"], (folder, manifest)
