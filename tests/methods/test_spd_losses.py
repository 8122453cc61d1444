"""SPD's losses, both forms of the paper's and the later code's, against the reference implementations' recorded numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from decomp_bench.config import parse
from decomp_bench.decomposer import Batch, SiteCodes
from decomp_bench.methods import _adversary, _spd_losses
from decomp_bench.methods._components import Components, aligned, masked_map
from decomp_bench.methods._gates import ScalarGates
from decomp_bench.methods._importance import Penalty, importances
from decomp_bench.methods.spd import SPD, SPDConfig
from decomp_bench.replacement import clean_points
from decomp_bench.targets.base import Architecture
from decomp_bench.targets.toys.tms import tms_target
from decomp_bench.train import learning_rate
from tests.golden.recorded import Golden
from tests.interop.test_spd_recorded import Whole


class Chain(nn.Module):
    """The recorded target: linear maps with a relu between them, and perhaps one after. Tokens look up their recorded inputs."""

    def __init__(self, golden: Golden, names: tuple[str, ...], last: bool) -> None:
        super().__init__()
        self.mlp, self.names, self.last, self.table = nn.Module(), names, last, golden["in.x"].reshape(-1, golden["in.x"].shape[-1])
        for name in names:
            weight, bias = golden[f"target.{name}.weight"], golden.tensors.get(f"target.{name}.bias")
            layer = nn.Linear(*weight.T.shape, bias=bias is not None)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias)
            setattr(self.mlp, name, layer)
        self.mlp.forward = self.chain

    def chain(self, x: Tensor) -> Tensor:
        for i, name in enumerate(self.names):
            x = self.mlp.get_submodule(name)(torch.relu(x) if i else x)
        return torch.relu(x) if self.last else x

    def forward(self, x: Tensor | None = None, input_ids: Tensor | None = None, use_cache: bool = False):
        return self.mlp(x) if x is not None else SimpleNamespace(logits=self.mlp(self.table[input_ids]))


GATE = {"main": ("ci.W0", "ci.b0", "ci.W1", "ci.b1"), "paper": ("gate.mlp_in", "gate.in_bias", "gate.mlp_out", "gate.out_bias")}


class Recorded:
    """A recorded decomposition in our method, and its batch."""

    def __init__(self, form: str, kind: str, **config) -> None:
        self.golden = golden = Golden(f"spd_{form}_losses_{kind}")
        self.form, self.names = form, ("a", "b", "c") if form == "main" else ("linear1", "linear2")
        net = Chain(golden, self.names, form == "paper" and kind == "mse")
        architecture = Architecture("mlp", "mlp", None, {f"mlp.{name}": f"mlp.{name}" for name in self.names})
        target = Whole("test:chain", net, architecture, 1, 6, "lm" if kind == "kl" else "regression", context=3)
        counts = {f"*.{name}": golden[f"out.ci_logit.{name}"].shape[-1] for name in self.names}
        config = {"components": counts, "gate": "scalar", "gate_hidden": (3,), "init": "random", "penalty": "lp", "subset": 0.0, **config}
        self.spd = SPD(parse(SPDConfig, config, "spd"), target, (0,), 0).train()
        self.parameters = {}
        for name in self.names:
            part, gates = self.spd.components[f"0.mlp.{name}"], self.spd.gates[f"0_mlp_{name}"]
            source = "param" if form == "main" else "out.init"
            places = {"V": part.V, "U": part.U}
            self.copy(places["V"], golden[f"{source}.{name}.V"])
            self.copy(places["U"], golden[f"{source}.{name}.U"])
            network = zip(GATE[form], (gates.weights[0], gates.biases[0], gates.weights[1], gates.biases[1]), strict=True)
            for key, place in network:
                self.copy(place, golden[f"param.{name}.{key}"])
                places[key] = place
            self.parameters |= {f"{name}.{key}": place for key, place in places.items()}
        positions = golden["in.x"].shape[:-1].numel()
        if kind == "mse":
            self.batch = Batch(x=golden["in.x"].reshape(positions, -1))
        else:
            self.batch = Batch(x=torch.arange(positions).view(-1, 3), length=torch.full((positions // 3,), 3))
        self.batch.clean, self.batch.logits = target.clean(self.batch.x, clean_points(self.spd))

    @staticmethod
    def copy(place: Tensor, value: Tensor) -> None:
        place.data.copy_(value.reshape(place.shape))

    def draws(self, key: str, routed: Tensor | None = None, delta: bool = True) -> list[Tensor]:
        """Recorded uniform numbers in the order in which our masks ask for them."""
        found = []
        for place, name in enumerate(self.names):
            chosen = slice(None) if routed is None else routed[:, place]
            u = f"draw.{key}.u.{name}" if self.form == "main" else f"draw.{key}.{name}"
            found.append(self.golden[u].flatten(0, -2)[chosen])
            if delta:
                found.append(self.golden[f"draw.{key}.delta.{name}"].flatten()[chosen])
        return found

    def agrees(self, theirs: str, term: Tensor, weight: float = 1.0) -> None:
        """A term's value and its gradient in every parameter."""
        self.golden.agrees(f"out.loss.{theirs}", term / weight)
        found = torch.autograd.grad(term / weight, list(self.parameters.values()), allow_unused=True, retain_graph=True)
        for key, gradient in zip(self.parameters, found, strict=True):
            expected = self.golden[f"grad.{theirs}.{key}"]
            gradient = torch.zeros_like(expected) if gradient is None else gradient.view_as(expected)
            assert float((gradient - expected).abs().max()) <= 3e-5 * max(float(expected.abs().max()), 1e-7), (theirs, key)


@pytest.fixture
def fed(monkeypatch):
    """Let masks be drawn from a queue."""

    def feed(decomposer: SPD, queue: list[Tensor]) -> None:
        def draw(*shape: int, device: torch.device) -> Tensor:
            return torch.zeros(shape) if not torch.Size(shape).numel() else queue.pop(0).reshape(shape)

        monkeypatch.setattr(decomposer.uniforms, "draw", draw)

    return feed


def routing(golden: Golden, key: str) -> Tensor:
    """Which maps a row runs, from the recorded size and noise: the k smallest ranks."""
    noise = golden[f"draw.{key}.route_noise"].flatten(1).T
    return noise.argsort(-1).argsort(-1) < golden[f"draw.{key}.k"].reshape(-1, 1)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(
    ("ours", "theirs", "draws"),
    [
        ("stochastic", "stochastic_recon", "stoch"),
        ("layerwise", "stochastic_recon_layerwise", "layerwise"),
        ("subset", "stochastic_recon_subset", "subset"),
        ("hidden", "stochastic_hidden_acts_recon", "hidden"),
        ("ci_masked", "ci_masked_recon", None),
        ("ci_layerwise", "ci_masked_recon_layerwise", None),
        ("unmasked", "unmasked_recon", None),
        ("faithfulness", "faithfulness", None),
        ("importance", "importance_minimality_p2_beta0_1", None),
    ],
)
def test_losses_of_the_later_code(kind, ours, theirs, draws, fed, monkeypatch):
    """Each term alone, with its weight taken out again, against the recorded value and gradients."""
    recorded = Recorded("main", kind, **{"p": 2.0, "beta": 0.1, "faithfulness": 0.0, "importance": 0.0, ours: 0.5})
    routed = routing(recorded.golden, "subset") if draws == "subset" else None
    if routed is not None:
        for place, name in enumerate(recorded.names):
            assert torch.equal(routed[:, place], recorded.golden[f"out.subset.routing.{name}"].bool().flatten())
        monkeypatch.setattr(_spd_losses, "uniform_subset", lambda *_: routed)
    queue = recorded.draws(draws, routed) if draws else []
    fed(recorded.spd, queue)
    recorded.agrees(theirs, recorded.spd.loss(recorded.batch, 0.0)[ours], 0.5)
    assert not queue


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_random_masks_without_the_remainder(kind, fed):
    recorded = Recorded("main", kind, stochastic=1.0, delta=False)
    fed(recorded.spd, recorded.draws("nodelta", delta=False))
    recorded.agrees("stochastic_recon_nodelta", recorded.spd.loss(recorded.batch, 0.0)["stochastic"])


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(
    ("case", "theirs", "scope", "route"),
    [
        ("pgd_unique", "pgd_recon_unique", "position", "all"),
        ("pgd_shared", "pgd_recon_shared", "shared", "all"),
        ("pgd_subset", "pgd_recon_subset_shared", "shared", "subset"),
        ("pgd_layerwise", "pgd_recon_layerwise_unique", "position", "layerwise"),
    ],
)
def test_an_adversary_that_starts_anew_in_each_step(kind, case, theirs, scope, route, monkeypatch):
    """Losses, gradients, and the sources before and after each of two ascents by the gradient's sign."""
    golden = Golden(f"spd_main_losses_{kind}")
    batch = 4 if kind == "kl" else 12
    recorded = Recorded(
        "main", kind, adversarial=0.5, adversary_scope=scope, adversary_routing=route, batch=batch,
        adversary_steps=golden.about["pgd"]["n_steps"], adversary_lr=golden.about["pgd"]["step_size"],
    )  # fmt: skip
    sources, seen, started = recorded.spd.adversary.sources, [], []

    def keep() -> None:
        seen.append({name: value.clone() for name, value in sources.value.items()})

    def start(*_args) -> None:
        call = f"call_{'abc'[len(started)]}." if route == "layerwise" else ""
        started.append(call)
        for name in recorded.names:
            shape = sources.shapes[f"0.mlp.{name}"]
            sources.value[f"0.mlp.{name}"] = golden[f"draw.{case}.{call}init.{name}"].reshape(shape).clone()
        keep()

    climb = sources.ascend
    monkeypatch.setattr(sources, "start", start)
    monkeypatch.setattr(sources, "ascend", lambda gradients, rate: (climb(gradients, rate), keep()))
    if route == "subset":
        monkeypatch.setattr(_adversary, "uniform_subset", lambda *_: routing(golden, "pgd_subset"))
    recorded.agrees(theirs, recorded.spd.loss(recorded.batch, 0.0)["adversarial"], 0.5)
    for name in recorded.names:
        if route == "layerwise":
            expected = {2 + 3 * i: golden[f"out.{case}.call_{call}.final_sources.{name}"] for i, call in enumerate("abc")}
        else:
            expected = {step: golden[f"out.{case}.sources_after_step{step}.{name}"] for step in range(3)}
        for i, value in expected.items():
            assert torch.allclose(seen[i][f"0.mlp.{name}"].flatten(0, 1), value.flatten(0, 1), atol=1e-6), (name, i)


PAPER = {"sigmoid": "leaky", "delta": False, "faithfulness": 0.0, "importance": 0.0}


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(
    ("ours", "theirs", "draws"),
    [
        ("faithfulness", "faithfulness", None),
        ("ci_masked", "recon", None),
        ("ci_layerwise", "recon_layerwise", None),
        ("unmasked", "out_recon", None),
        ("stochastic", "stochastic_recon", "u_stoch"),
        ("layerwise", "stochastic_recon_layerwise", "u_layerwise"),
        ("schatten", "schatten_p0_9", None),
        *((("importance", f"importance_minimality_p{p}", None)) for p in ("0_9", "1_0", "2_0")),
    ],
)
def test_losses_of_the_paper(kind, ours, theirs, draws, fed):
    p = float(theirs.rpartition("_p")[2].replace("_", ".")) if "_p" in theirs else 1.0
    recorded = Recorded("paper", kind, **{**PAPER, "p": p, ours: 0.5})
    fed(recorded.spd, recorded.draws(draws, delta=False) if draws else [])
    recorded.agrees(theirs, recorded.spd.loss(recorded.batch, 0.0)[ours], 0.5)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_paper_s_losses_together_and_its_initialisation(kind, fed):
    names = {"faithfulness": "faithfulness", "ci_masked": "recon", "stochastic": "stochastic_recon", "ci_layerwise": "recon_layerwise",
             "layerwise": "stochastic_recon_layerwise", "importance": "importance_minimality", "schatten": "schatten",
             "unmasked": "out_recon"}  # fmt: skip
    golden = Golden(f"spd_paper_losses_{kind}")
    weights = {ours: golden.about["coefficients"][f"{theirs}_coeff"] for ours, theirs in names.items()}
    recorded = Recorded("paper", kind, **{**PAPER, **weights, "p": golden.about["pnorm_of_total"]})
    fed(recorded.spd, recorded.draws("u_stoch", delta=False) + recorded.draws("u_layerwise", delta=False))
    terms = recorded.spd.loss(recorded.batch, 0.0)
    assert set(terms) == set(names)
    recorded.agrees("total", torch.stack(list(terms.values())).sum())
    for name in recorded.names:
        V, U = aligned(*(golden[f"draw.init_normal_{part}.{name}"] for part in "VU"), golden[f"target.{name}.weight"])
        golden.agrees(f"out.init.{name}.V", V)
        golden.agrees(f"out.init.{name}.U", U)


def test_an_embedding_is_a_map_of_one_hot_rows():
    """The paper's components of an embedding, their initialisation and their affine gate, which reads the inner activation."""
    golden = Golden("spd_paper_embedding_gate")
    embed = golden["target.embed.weight"]
    part = Components(*aligned(golden["draw.init_normal_V"], golden["draw.init_normal_U"], embed.T))
    golden.agrees("out.init.V", part.V)
    golden.agrees("out.init.U", part.U)
    golden.agrees("out.weight", part.V @ part.U)
    strength = torch.eye(len(embed))[golden["in.ids"]] @ part.V
    gate = ScalarGates(part.n, (), 0.0, torch.Generator())
    gate.weights[0].data.copy_(golden["param.gate.weight"].view(-1, 1, 1))
    gate.biases[0].data.copy_(golden["param.gate.bias"].view(-1, 1))
    golden.agrees("out.gate_logit", gate(strength))
    found = masked_map(torch.eye(len(embed))[golden["in.ids"]], SiteCodes(strength, golden["in.mask"]), part.U, embed.T, None)
    golden.agrees("out.masked_embedding", found)
    for part_name, gradient in zip("VU", torch.autograd.grad(found.square().sum(), [part.V, part.U]), strict=True):
        golden.agrees(f"grad.sum_masked_embedding.{part_name}", gradient)


# ---- the published training


def test_three_steps_of_the_paper_s_training_of_tms(fed):
    """Losses, rates and weights of the preset `paper_form`, whose tied matrices are moved twice in each step."""
    golden = Golden("tms52_spd_paper_3steps")
    about, shared = golden.about, dict(SPD.presets["paper_form"])
    target = tms_target(golden["target.linear1.weight"], golden["target.linear2.bias"], "test:tms")
    sizes = {"components": about["C"], "gate_hidden": (about["n_ci_mlp_neurons"],), "batch": about["batch"], "steps": about["steps"]}
    config = {**shared, **sizes}
    spd = SPD(parse(SPDConfig, config, "spd"), target, (0,), 0).train()
    maps = {"linear1": "0.mlp.up", "linear2": "0.mlp.down"}
    first = spd.components["0.mlp.up"]
    V, U = aligned(*(golden[f"draw.init_normal_{part}.linear1"] for part in "VU"), golden["target.linear1.weight"])
    first.V.data.copy_(V)
    first.U.data.copy_(U)
    parameters = {f"{theirs}.{part}": getattr(spd.components[ours], part) for theirs, ours in maps.items() for part in "VU"}
    for theirs, ours in maps.items():
        gates = spd.gates[ours.replace(".", "_")]
        for key, place in zip(GATE["paper"], (gates.weights[0], gates.biases[0], gates.weights[1], gates.biases[1]), strict=True):
            Recorded.copy(place, golden[f"param.{theirs}.{key}"])
            parameters[f"{theirs}.{key}"] = place
    groups = [{**group, "lr": group["lr"]} for group in spd.parameter_groups()]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    for step in range(about["steps"] + 1):
        for key, place in parameters.items():
            expected = golden.tensors.get(f"out.{f'after{step}' if step else 'start'}.{key}")
            assert expected is None or torch.allclose(place.detach().reshape(expected.shape), expected, atol=2e-5), (step, key)
        batch = Batch(x=golden[f"in.batch.{step}"])
        batch.clean, batch.logits = target.clean(batch.x, clean_points(spd))
        fed(spd, [golden[f"draw.step{step}.{kind}.{name}"] for kind in ("u_stoch", "u_layerwise") for name in maps])
        terms = spd.loss(batch, step / about["steps"])
        golden.agrees(f"out.step{step}.faithfulness", terms["faithfulness"])
        golden.agrees(f"out.step{step}.stochastic_recon", terms["stochastic"])
        golden.agrees(f"out.step{step}.stochastic_recon_layerwise", terms["layerwise"])
        golden.agrees(f"out.step{step}.importance_minimality", terms["importance"] / about["coeffs"]["importance_minimality"])
        golden.agrees(f"out.step{step}.total", sum(terms.values()))
        rate = spd.config.lr * learning_rate(spd.config, step)
        if step == about["steps"]:
            break
        assert rate == pytest.approx(float(golden["out.lr"][step]), abs=1e-9)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("form", ["paper", "main"])
def test_schedules_of_rates(form, kind):
    """Ours count a warm-up from its first step and reach the end where their last step would be: so much is shifted here."""
    golden = Golden(f"lr_schedules_spd_{form}")
    total = golden.about["steps" if form == "paper" else "total_steps"]
    end = golden.about["final_val_frac"][kind] if form == "main" else 0.0
    quarter = form == "paper" and kind == "cosine"
    one_less = not (quarter or (form == "paper" and kind == "linear"))
    for share in golden.about["warmups"]:
        warm = int(total * share)
        steps = total - one_less
        config = SPDConfig(
            lr=golden.about["lr" if form == "paper" else "start_val"], steps=steps, warmup=0, decay_from=warm / steps, lr_end=end,
            schedule="quarter_cosine" if quarter else kind,
        )  # fmt: skip
        rising = config.model_copy(update={"warmup": max(warm - 1, 0)})
        for step, rate in zip(golden["in.steps"].tolist(), golden[f"out.{kind}.warmup{share}"].tolist(), strict=True):
            if warm and 0 < step < warm:
                assert config.lr * learning_rate(rising, step - 1) == pytest.approx(rate, abs=1e-9)
            elif warm <= step < total:
                assert config.lr * learning_rate(config, step) == pytest.approx(rate, abs=1e-9), (kind, share, step)


def test_importances_of_the_paper_go_below_zero_and_its_masks_with_them():
    z = torch.tensor([[-2.0, 0.5]])
    lower, _, _ = importances(z, torch.ones(1), 1.0, Penalty("lp", 1.0), straight=False)
    assert torch.allclose(lower, torch.tensor([[-0.02, 0.5]]))
