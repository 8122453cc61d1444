"""Runs of SPD and VPD in their authors' layouts, read and compared with a computation of its own over every kind of network."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Decomposer
from decomp_bench.errors import UserError
from decomp_bench.interop.spd import read
from decomp_bench.replacement import clean_codes, clean_points
from tests.interop.runs import write

TRANSFORMER = {"d_model": 8, "n_blocks": 2, "mlp_hidden_dim": [12], "attn_config": {"n_heads": 2, "max_len": 64, "rope_base": 500.0}}
LASTS = {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.down_proj"} | {f"attn.{one}": f"attn.{one}_proj" for one in "qkvo"}
KINDS = ["mlp", "vector_mlp", "shared_mlp", "global_shared_mlp", "global_shared_transformer"]


def places_of(target, layers=(0, 1, 2)) -> dict[str, str]:
    """Reference path -> point: the MLPs of some layers, and attention of the first."""
    points = [p for layer in layers for p in target.maps(layer)] + target.maps(layers[0], "attn")
    return {f"h.{p[0]}.{LASTS[p[2:]]}": p for p in points}


def random_run(kind: str, target, places: dict[str, str], prefix: str = "ci_fn._ci_fns."):
    """State dict and config of a run with random weights in the published layout."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    counts = {path: 3 + i for i, path in enumerate(sorted(places))}
    state = {}
    for path, point in places.items():
        d_out, d_in = target.weight(point).shape
        key = path.replace(".", "-")
        state |= {f"_components.{key}.V": draw(d_in, counts[path]), f"_components.{key}.U": draw(counts[path], d_out)}
        state[f"target_model.{path}.weight"] = target.weight(point).detach().clone()
        sizes = {"mlp": [1, 3, 1], "vector_mlp": [d_in, 3, 1], "shared_mlp": [d_in, 6, 5, counts[path]]}.get(kind, [])
        for i, (a, b) in enumerate(pairwise(sizes)):
            side = () if kind == "shared_mlp" else (counts[path],)
            state |= {f"{prefix}{key}.layers.{2 * i}.W": draw(*side, a, b), f"{prefix}{key}.layers.{2 * i}.b": draw(*side, b)}
    wide, total = sum(target.size(point) for point in places.values()), sum(counts.values())
    start = "ci_fn._global_ci_fn."
    if kind == "global_shared_mlp":
        for i, a, b in ((0, wide, 6), (2, 6, total)):
            state |= {f"{start}layers.{i}.W": draw(a, b), f"{start}layers.{i}.b": draw(b)}
    if kind == "global_shared_transformer":
        for name, a, b in (("_input_projector", wide, 8), ("_output_head", 8, total),
                           *((f"_blocks.{i}.mlp.{j}", *size) for i in (0, 1) for j, size in ((0, (8, 12)), (2, (12, 8))))):
            state |= {f"{start}{name}.W": draw(a, b), f"{start}{name}.b": draw(b)}
        for i in (0, 1):
            state |= {f"{start}_blocks.{i}.attn.{name}_proj.weight": draw(8, 8) for name in ("q", "k", "v", "out")}
    mode = "global" if kind.startswith("global") else "layerwise"
    one = {"mode": mode, "fn_type": kind} | ({"simple_transformer_ci_cfg": TRANSFORMER} if kind == KINDS[-1] else {})
    info = [{"module_pattern": path, "C": count} for path, count in counts.items()]
    importance = {"classname": "ImportanceMinimalityLoss", "coeff": 0.25, "pnorm": 2.0, "beta": 0.5}
    losses = [importance, {"classname": "FaithfulnessLoss", "coeff": 9.0}]
    return state, {"ci_config": one, "module_info": info, "sigmoid_type": "leaky_hard", "use_delta_component": True,
                   "ci_alive_threshold": 0.1, "loss_metric_configs": losses}  # fmt: skip


def normal(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turned(x: Tensor) -> Tensor:
    """[T, heads, 4] as complex pairs turned by their position."""
    angle = torch.outer(torch.arange(len(x)), 500.0 ** -(torch.arange(2) / 2))
    return torch.view_as_complex(torch.stack([x[..., :2], x[..., 2:]], -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]


def transformer_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The transformer of one row [T, d], from its description."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"ci_fn._global_ci_fn.{name}.W"] + state[f"ci_fn._global_ci_fn.{name}.b"]

    x = linear("_input_projector", x)
    for i in (0, 1):
        weights = {name: state[f"ci_fn._global_ci_fn._blocks.{i}.attn.{name}_proj.weight"] for name in ("q", "k", "v", "out")}
        q, k, v = ((normal(x) @ weights[name].T).view(-1, 2, 4) for name in "qkv")
        seen = (torch.einsum("thc,shc->hts", turned(q), turned(k).conj()).real / 2).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", seen, v).flatten(1) @ weights["out"].T
        x = x + linear(f"_blocks.{i}.mlp.2", F.gelu(linear(f"_blocks.{i}.mlp.0", normal(x))))
    return linear("_output_head", x)


def by_hand(kind: str, state: dict[str, Tensor], acts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of one row [T, C] from the inputs [T, d] of every module path, written from the description of the networks."""
    order = sorted(acts)
    counts = {path: state[f"_components.{path.replace('.', '-')}.V"].shape[1] for path in order}
    if kind.startswith("global"):
        start = "ci_fn._global_ci_fn.layers."
        if kind == "global_shared_mlp":
            x = torch.cat([acts[path] for path in order], 1)
            z = F.gelu(x @ state[f"{start}0.W"] + state[f"{start}0.b"]) @ state[f"{start}2.W"] + state[f"{start}2.b"]
        else:
            z = transformer_by_hand(state, torch.cat([normal(acts[path]) for path in order], 1))
        return dict(zip(order, z.split(list(counts.values()), 1), strict=True))
    return {path: of_a_map_by_hand(kind, state, path.replace(".", "-"), x, counts[path]) for path, x in acts.items()}


def of_a_map_by_hand(kind: str, state: dict[str, Tensor], key: str, x: Tensor, n: int) -> Tensor:
    """One map's network, one component at a time where each has its own."""
    names = [f"ci_fn._ci_fns.{key}.layers.{i}" for i in (0, 2, 4)]
    layers = [(state[f"{name}.W"], state[f"{name}.b"]) for name in names if f"{name}.W" in state]
    columns = []
    for c in range(1 if kind == "shared_mlp" else n):
        value = (x @ state[f"_components.{key}.V"])[:, c : c + 1] if kind == "mlp" else x
        for j, (w, b) in enumerate(layers):
            value = value if j == 0 else F.gelu(value)
            value = value @ w + b if kind == "shared_mlp" else value @ w[c] + b[c]
        columns.append(value)
    return torch.cat(columns, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstruction_agree_with_a_computation_by_hand_and_survive_saving(kind, lm, tmp_path):
    target, source = lm
    places = places_of(target)
    state, config = random_run(kind, target, places)
    made = read(write(tmp_path / "run", state, config), target)
    assert (made.layers, made.config.threshold, made.config.importance, made.config.faithfulness, made.config.beta, made.seed) == (
        (0, 1, 2), 0.1, 0.25, 9.0, 0.5, 3,
    )  # fmt: skip
    lengths = source.rows("train").length
    rows = np.array([int(lengths.argmin()), int(lengths.argmax()), 0])
    batch = with_clean(source, source.batch("train", rows), clean_points(made))
    codes, hard = clean_codes(made.at(mask="soft", threshold=0.0), batch), clean_codes(made, batch)
    masks = {path: torch.zeros(*batch.x.shape, codes[point].gate.shape[-1]) for path, point in places.items()}
    for row, length in enumerate(batch.length.tolist()):
        acts = {path: batch.clean[point][row, :length] for path, point in places.items()}
        for path, z in by_hand(kind, state, acts).items():
            ours = codes[places[path]]
            assert torch.allclose(ours.gate[row, : length - 1], z.clamp(0, 1)[1:], atol=1e-5), path
            strength = acts[path] @ state[f"_components.{path.replace('.', '-')}.V"]
            assert torch.allclose(ours.strength[row, : length - 1], strength[1:], atol=1e-5)
            masks[path][row, 1:length] = hard[places[path]].gate[row, : length - 1]
            near = (z[1:] - 0.1).abs() < 1e-5
            assert torch.equal(masks[path][row, 1:length][~near], (z[1:] > 0.1).float()[~near])
    hooks = []
    for path, point in places.items():
        def masked(_module, args, y, path=path):
            V, U = (state[f"_components.{path.replace('.', '-')}.{part}"] for part in "VU")
            return torch.cat([y[:, :1], ((args[0] @ V * masks[path]) @ U)[:, 1:]], 1)
        hooks.append(target.part(point).register_forward_hook(masked))
    expected = target(batch.x)
    for hook in hooks:
        hook.remove()
    found = made.replaced(batch, gates="clean").logits
    for row, length in enumerate(batch.length.tolist()):
        scale = expected[row, :length].abs().max().clamp(min=1)
        assert (found[row, :length] - expected[row, :length]).abs().max() <= 1e-5 * scale
    made.save(tmp_path / "again")
    again = clean_codes(Decomposer.load(tmp_path / "again", target), batch)
    assert all(torch.allclose(again[name].gate, one.gate, atol=1e-6) and torch.allclose(again[name].strength, one.strength, atol=1e-6)
               for name, one in hard.items())


@pytest.mark.parametrize("kind", ["mlp", "global_shared_transformer"])
def test_earlier_layouts_and_safetensors_give_the_same_decomposition(kind, lm, tmp_path):
    target, source = lm
    places = places_of(target, (1,))
    state, config = random_run(kind, target, places)
    now = read(write(tmp_path / "now", state, config), target)
    old = {key.replace("ci_fn._ci_fns.", "_gates.").replace("target_model.", "patched_model."): value for key, value in state.items()}
    for path in places:
        key = path.replace(".", "-")
        old |= {f"patched_model.{path}.components.{part}": old.pop(f"_components.{key}.{part}") for part in "VU"}
        old[f"patched_model.{path}.original.weight"] = old.pop(f"patched_model.{path}.weight")
    folder = tmp_path / "old"
    one = config.pop("ci_config")
    later = {"pd": {**config, "ci_config": one, "steps": 10, "batch_size": 4}}  # settings of the method apart from the others
    config |= {"gate_type": kind, "gate_hidden_dims": [3]} if kind == "mlp" else later
    write(folder, old, config, step=900)
    save_file({key: value.contiguous() for key, value in old.items()}, folder / "model_1000.safetensors")
    torch.save({}, folder / "model_900.pth")  # an earlier step, not to be read
    then = read(str(folder), target)
    batch = with_clean(source, source.batch("train", np.arange(2)), clean_points(now))
    first, second = clean_codes(now.at(mask="soft"), batch), clean_codes(then.at(mask="soft"), batch)
    assert all(torch.equal(first[name].gate, second[name].gate) for name in first)


def test_layers_can_be_chosen_where_each_map_has_its_own_network(lm, tmp_path):
    target, _ = lm
    state, config = random_run("shared_mlp", target, places_of(target))
    folder = write(tmp_path / "run", state, config)
    made = read(folder, target, (1,))
    assert {site.name for site in made.sites} == {"1.mlp.up", "1.mlp.down"}
    state["_components.wte.V"], state["_components.wte.U"] = torch.randn(30, 4), torch.randn(4, 16)
    borrowed = {key: value for key, value in state.items() if key.startswith("ci_fn._ci_fns.h-1-mlp-c_fc")}
    state |= {key.replace("h-1-mlp-c_fc", "wte"): value for key, value in borrowed.items()}
    config["module_info"].append({"module_pattern": "wte", "C": 4})
    folder = write(tmp_path / "run", state, config)
    assert read(folder, target, (1,)).layers == (1,)
    with pytest.raises(UserError, match=r"wte, which is no linear map.*embeddings"):
        read(folder, target)
    state, config = random_run("global_shared_mlp", target, places_of(target))
    with pytest.raises(UserError, match="without choosing layers"):
        read(write(tmp_path / "global", state, config), target, (1,))


def changed(key, value):
    return lambda state, config: (state, {**config, key: value})


def without(part):
    return lambda state, config: ({key: value for key, value in state.items() if part not in key}, config)


BROKEN = {
    "sigmoid_type 'normal'": changed("sigmoid_type", "normal"),
    "inserted identities": changed("identity_module_info", [{"module_pattern": "h.*", "C": 2}]),
    "not known": changed("ci_config", {"mode": "global", "fn_type": "global_reverse_residual"}),
    "read resid, which are not decomposed": changed("ci_config", {"fn_type": "shared_mlp", "extra_input_module_patterns": ["resid"]}),
    "of different runs": changed("module_info", [{"module_pattern": "h.*", "C": 99}]),
    "names no components for h.0.": changed("module_info", [{"module_pattern": "h.1.*", "C": 9}]),
    "is not the config": changed("module_info", None),
    "are not of type scalar": changed("ci_config", {"mode": "layerwise", "fn_type": "mlp"}),
    "lack V or U": without("h-1-mlp-c_fc.V"),
    "the importances of h.1.mlp.c_fc": without("_ci_fns.h-1-mlp-c_fc.layers.2"),
    "unexpected tensors adapter.a": lambda state, config: ({**state, "adapter.a": torch.ones(2)}, config),
    "the run decomposes another model": lambda state, config: (
        {key: value + 1 if key.startswith("target_model.h.1.mlp.c_fc") else value for key, value in state.items()}, config,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", BROKEN)
def test_what_cannot_be_read_is_refused_in_one_line(reason, lm, tmp_path):
    target, _ = lm
    state, config = BROKEN[reason](*random_run("shared_mlp", target, places_of(target)))
    with pytest.raises(UserError, match=reason) as caught:
        read(write(tmp_path / "run", state, config), target)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_are_no_state_dict_are_refused(lm, tmp_path):
    target, _ = lm
    with pytest.raises(UserError, match="no folder"):
        read(str(tmp_path / "nowhere"), target)
    with pytest.raises(UserError, match=r"no model_STEP\.pth"):
        read(str(tmp_path), target)
    (tmp_path / "model_3.pth").write_bytes(b"not torch")
    with pytest.raises(UserError, match="not a state dict"):
        read(str(tmp_path), target)
    torch.save({"model": print}, tmp_path / "model_4.pth")
    with pytest.raises(UserError, match="not a state dict"):
        read(str(tmp_path), target)


def test_an_imported_run_is_scored_like_any_other(tiny_arcee, lm, tmp_path, monkeypatch):
    """Through the command: a run folder whose rows say that the gates of a global network come from the clean pass."""
    from typer.testing import CliRunner

    import decomp_bench
    from decomp_bench.cli import app

    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    target, _ = lm
    folder = write(tmp_path / "run", *random_run("global_shared_transformer", target, places_of(target)))
    settings = (f"data.source={tiny_arcee / 'text.jsonl'}", "eval.tokens=300", "eval.bootstrap=2", "eval.sweep=false")
    options = ["--target", f"hf:{tiny_arcee}", "--device", "cpu", *(word for one in settings for word in ("--set", one))]
    for kind in ("vpd", "spd"):
        done = CliRunner().invoke(app, ["import", folder, "--from", kind, *options])
        assert done.exit_code == 0, done.output
    run = done.output.rsplit("decomp-bench eval ", 1)[1].strip()
    assert CliRunner().invoke(app, ["eval", run]).exit_code == 0
    rows = decomp_bench.load_run(run).results()
    kl = rows[(rows.metric == "kl") & (rows.site == "all")]
    assert set(kl[kl.applicable == "yes"].gates) == {"clean"}
    assert kl[kl.gates == "self"].reason.str.contains("runs after its site").all()
