"""Every architecture: the points are where they say, and what is decomposed into everything is the model itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
import yaml

from decomp_bench import api, data, targets
from decomp_bench.analysis import pareto
from decomp_bench.config import DataConfig, parse
from decomp_bench.data.streams import with_clean
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from decomp_bench.replacement import ablated, clean_points
from decomp_bench.targets.architectures import LAYOUTS
from tests.conftest import tiny_tokenizer
from tests.targets.models import GATED, GROUPED, KINDS, build, save


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = ["the cat", "a dog", "runs", "sleeps", "on", "the mat", "and", "sings", "to", "a fox"]
    chosen = np.random.default_rng(0).integers(len(words), size=(160, 12))
    file.write_text("".join(json.dumps({"text": " ".join(words[i] for i in row) + "."}) + "\n" for row in chosen))
    return file


@pytest.fixture(params=KINDS, scope="module")
def world(request, tmp_path_factory, text):
    """(kind, folder, target, source)"""
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    target = targets.load(f"hf:{folder}")
    return request.param, folder, target, data.source(target, DataConfig(source=str(text), context=32))


def make(name: str, target, **config):
    kind = method(name)
    return kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), 0).eval()


def a_batch(decomposer, source, rows=3):
    return with_clean(source, source.batch("train", np.arange(rows)), clean_points(decomposer))


def near(found, expected, tolerance=1e-5):
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def test_every_row_of_the_table_is_tested():
    assert {build(kind).config.model_type for kind in KINDS} == set(LAYOUTS)


def test_the_model_is_the_published_one(world):
    kind, folder, target, source = world
    x = source.batch("train", np.arange(3)).x
    published = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        near(target(x), published(input_ids=x, use_cache=False).logits)
    assert (target.layers, target.width) == (3, 16)
    assert target.maps(1) == [f"1.mlp.{m}" for m in (("gate", "up", "down") if kind in GATED else ("up", "down"))]
    assert [p.split(".", 1)[1] for p in target.maps(1, "attn")] == ["attn.q", "attn.k", "attn.v", "attn.o"]


def test_points_are_where_they_say(world):
    _, _, target, source = world
    x = source.batch("train", np.arange(3)).x
    maps = [*target.maps(1), *target.maps(1, "attn")]
    found, _ = target.clean(x, {"1.mlp.in", "1.mlp.out", "1.attn.in", "1.resid", "2.resid", *maps})
    assert found["1.resid"].shape == found["1.mlp.in"].shape == found["1.mlp.out"].shape == (*x.shape, 16)
    assert not torch.equal(found["1.resid"], found["2.resid"])
    near(target.part("1.mlp")(found["1.mlp.in"]), found["1.mlp.out"])
    for point in maps:
        weight, bias = target.weight(point), target.bias(point)
        assert target.size(point) == weight.shape[1] == found[point].shape[-1]
        value = found[point] @ weight.T + (0 if bias is None else bias)
        near(value, target.part(point)(found[point]))
        if point.endswith("mlp.down"):
            near(value, found["1.mlp.out"])
        if not point.endswith((".o", ".down")):
            assert torch.equal(found[point], found["1.mlp.in" if ".mlp." in point else "1.attn.in"])


def test_nothing_replaced_is_the_model_itself(world):
    _, _, target, source = world
    decomposer = make("neurons", target)
    batch = a_batch(decomposer, source)
    with torch.no_grad():
        own = target.module(input_ids=batch.x, use_cache=False).logits
    assert torch.equal(own, batch.logits)
    assert torch.equal(decomposer.replaced(batch, layers=()).logits, own)
    decomposer.replaced(batch)
    assert torch.equal(target(batch.x), own), "modules are put back"


@torch.no_grad()
def test_everything_kept_is_the_model_itself(world):
    """Neurons at all k, SPD with all masks and the remainder on, and every singular component, under each protocol."""
    _, _, target, source = world
    views = [make("neurons", target).at(k=24), make("svd", target).at(k=24)]
    views += [make("spd", target, components=7, init="random", gate_hidden=(4,), attention=attn).at(mask="all", delta=True)
              for attn in (False, True)]  # fmt: skip
    for view in views:
        batch = a_batch(view, source)
        for protocol in ("cascading", "clean"):
            near(view.replaced(batch, protocol=protocol).logits, batch.logits)
        for layer in range(target.layers):
            near(view.replaced(batch, layers=(layer,), protocol="single").logits, batch.logits)


@torch.no_grad()
def test_attention_is_confined_to_documents_on_request(world):
    """A document after another, behind a mask, is the document alone: each position, wherever the boundary lies."""
    _, folder, _, _ = world
    target = targets.load(f"hf:{folder}")
    words = np.random.default_rng(0).integers(1, 9, size=(2, 14))
    x = torch.tensor([[*words[0, :9], 0, *words[1, :5], 0, *words[1, 5:]]])
    crossing = target(x)
    target.confine(0)
    near(target(x)[:, 10:16], target(x[:, 10:16]))
    near(target(x)[:, 16:], target(x[:, 16:]))
    assert float((target(x) - crossing)[:, 10:].abs().max()) > 1e-3
    found, _ = target.clean(x, {"1.mlp.in"}, logits=False)
    near(found["1.mlp.in"][:, 10:16], target.clean(x[:, 10:16], {"1.mlp.in"})[0]["1.mlp.in"])
    target.confine(None)
    assert torch.equal(target(x), crossing)


@torch.no_grad()
def test_one_layer_replaced_is_that_layer_spliced_by_hand(world):
    """Blocks before the layer are stood in for; the result is that of a hook on the whole model."""
    _, _, target, source = world
    batch = a_batch(make("neurons", target), source)
    value = torch.linspace(-1, 1, 16)
    handle = target.part("2.mlp").register_forward_hook(lambda _m, _a, y: torch.cat([y[:, :1], value.expand_as(y)[:, 1:]], 1))
    by_hand = target(batch.x)
    handle.remove()
    near(ablated(target, batch, {2: value}), by_hand)
    assert float((by_hand - batch.logits).abs().max()) > 1e-3


def test_a_run_is_trained_evaluated_and_plotted(world, text, tmp_path, monkeypatch):
    _, folder, _, _ = world
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    where = {"target": f"hf:{folder}", "layers": (1,), "data": {"source": str(text), "context": 32}}
    run = api.train_run("spd", steps=3, batch=2, components=6, gate_hidden=(4,), warmup_faith=5, **where)
    frame = api.evaluate_run(run, tokens=40, batch=4, bootstrap=5, sweep=False)
    assert set(frame["protocol"]) >= {"cascading", "clean", "single"}
    assert np.isfinite(frame.loc[frame["applicable"] == "yes", "value"].dropna()).all()
    assert pareto(frame).axes


# ---- a layout from the model's folder


PATHS = {"block": "model.layers.{}", "mlp": "mlp", "attn": "self_attn", "maps": {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}}


@pytest.fixture
def unknown(tmp_path):
    """A folder of an architecture that the table lacks."""
    config = transformers.Starcoder2Config(**GROUPED)
    transformers.Starcoder2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_an_unknown_architecture_is_used_by_naming_its_paths(unknown, text):
    with pytest.raises(UserError, match=r"'starcoder2' is not known; name its module paths \(block, mlp, .* in .*decomp_bench") as error:
        targets.load(f"hf:{unknown}")
    assert "\n" not in str(error.value)
    (unknown / "decomp_bench.yaml").write_text(yaml.safe_dump(PATHS))
    target = targets.load(f"hf:{unknown}")
    assert target.maps(2) == ["2.mlp.up", "2.mlp.down"]
    decomposer = make("neurons", target).at(k=24)
    batch = a_batch(decomposer, data.source(target, DataConfig(source=str(text))))
    near(decomposer.replaced(batch).logits, batch.logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block": "model.layers"}, "must hold {} once"),
        ({"block": "layers.{}"}, r"has no module 'layers\.0': correct 'block'"),
        ({"mlp": "ffn"}, r"has no module 'ffn' in its blocks: correct decomp_bench\.yaml; a block has .*mlp\.c_fc"),
        ({"maps": {"mlp.middle": "mlp.c_fc"}}, "unknown map 'mlp.middle'; known: mlp.gate"),
        ({"modules": []}, "unknown key 'modules'"),
    ],
)
def test_a_wrong_path_is_one_line_that_names_the_fix(unknown, change, says):
    (unknown / "decomp_bench.yaml").write_text(yaml.safe_dump({**PATHS, **change}))
    with pytest.raises(UserError, match=says) as error:
        targets.load(f"hf:{unknown}")
    assert "\n" not in str(error.value)


def test_a_folder_may_change_what_the_table_says_and_is_then_another_target(tmp_path):
    plain = targets.load(f"hf:{save('gpt2', tmp_path)}")
    (tmp_path / "decomp_bench.yaml").write_text("{attn: null, maps: {'attn.q+attn.k+attn.v': null, attn.o: null}}")
    changed = targets.load(f"hf:{tmp_path}")
    assert list(changed.map_paths) == [p for p in plain.map_paths if ".mlp." in p]
    assert changed.identity != plain.identity


# ---- checkpoints in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_16_bit_checkpoints_are_held_as_stored_and_evaluated_in_32(kind, dtype, tmp_path, text):
    target = targets.load(f"hf:{save(kind, tmp_path, dtype)}")
    source = data.source(target, DataConfig(source=str(text)))
    spd = make("spd", target, components=7, init="random", gate_hidden=(4,)).at(mask="all", delta=True)
    batch = a_batch(spd, source)
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    near(batch.logits, wide(input_ids=batch.x, use_cache=False).logits)
    assert batch.logits.dtype == torch.float32
    assert {target.part(point).weight.dtype for point in target.map_paths} == {dtype}
    assert {target.weight(point).dtype for point in target.map_paths} == {torch.float32}
    for view in (spd, make("neurons", target).at(k=24)):
        near(view.replaced(batch).logits, batch.logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert float((target(batch.x).float() - batch.logits).abs().mean()) < 0.1 * float(batch.logits.std())


def test_weights_that_are_missing_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    file = save("qwen3", tmp_path) / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of its architecture: model\.layers\.1\.mlp"):
        targets.load(f"hf:{tmp_path}")
