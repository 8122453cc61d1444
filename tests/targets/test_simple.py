"""Goodfire's checkpoints against the models written down independently: the same logits, and one line for what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from safetensors.torch import save_file

from decomp_bench import targets
from decomp_bench.errors import UserError
from tests.conftest import tiny_tokenizer

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT = 31, 24, 2, 4, 20
BASE = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "block_size": CONTEXT}
LLAMA = {**BASE, "n_ctx": CONTEXT, "n_key_value_heads": 2, "rotary_base": 500, "rms_norm_eps": 1e-3, "rotary_dim": 3}
PAIRS = {**LLAMA, "rotary_adjacent_pairs": True, "attn_bias": True, "mlp_bias": True}
# name -> (scheme, config, MLP width, whether the head is tied, whether maps have biases)
CASES = {
    "mlp": ("llama-simple-mlp", LLAMA, 96, True, False),
    "mlp, untied, pairs": ("llama-simple-mlp", PAIRS, 40, False, True),
    "mlp, one matrix": ("llama-simple-mlp", {**LLAMA, "use_grouped_query_attention": False}, 96, True, False),
    "swiglu": ("llama-simple", {**LLAMA, "model_type": "LlamaSimple"}, 64, True, False),
    "gpt2": ("gpt2-simple", {**BASE, "model_type": "GPT2Simple"}, 96, True, True),
}


def weights(case: str) -> dict[str, torch.Tensor]:
    """A state dict with the published names, large enough that every part matters."""
    scheme, config, hidden, tied, biased = CASES[case]
    generator = torch.Generator().manual_seed(3)
    kv = WIDTH // HEADS * config.get("n_key_value_heads", HEADS)
    state = {"wte.weight": (VOCAB, WIDTH), "ln_f.weight": (WIDTH,)}
    maps = {"attn.q_proj": (WIDTH, WIDTH), "attn.k_proj": (kv, WIDTH), "attn.v_proj": (kv, WIDTH)}
    if not config.get("use_grouped_query_attention", True):
        maps = {"attn.c_attn": (3 * WIDTH, WIDTH)}
    up = ("mlp.gate_proj", "mlp.up_proj") if scheme == "llama-simple" else ("mlp.c_fc",)
    maps |= {"attn.o_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, hidden), **dict.fromkeys(up, (hidden, WIDTH))}
    gpt2 = scheme == "gpt2-simple"
    if gpt2:
        state |= {"wpe.weight": (CONTEXT, WIDTH), "ln_f.bias": (WIDTH,)}
    for layer in range(LAYERS):
        for norm in ("ln_1", "ln_2") if gpt2 else ("rms_1", "rms_2"):
            state |= {f"h.{layer}.{norm}.weight": (WIDTH,), **({f"h.{layer}.{norm}.bias": (WIDTH,)} if gpt2 else {})}
        for name, shape in maps.items():
            state |= {f"h.{layer}.{name}.weight": shape, **({f"h.{layer}.{name}.bias": shape[:1]} if biased else {})}
    made = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in state.items()}
    made |= {name: 1 + value for name, value in made.items() if name.split(".")[-2].startswith(("ln_", "rms_")) and name.endswith("weight")}
    return {**made, "lm_head.weight": made["wte.weight"] if tied else torch.randn(VOCAB, WIDTH, generator=generator)}


def by_hand(case: str, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits, in double precision and one head at a time."""
    scheme, config, *_ = CASES[case]
    w = {name: value.double() for name, value in state.items()}
    gpt2, size, T = scheme == "gpt2-simple", WIDTH // HEADS, ids.shape[1]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        if gpt2:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def rotated(head):
        if gpt2:
            return head
        out = torch.empty_like(head)
        for i in range(size // 2):
            a, b = (2 * i, 2 * i + 1) if config.get("rotary_adjacent_pairs") else (i, i + size // 2)
            angle = torch.arange(T).double() / config["rotary_base"] ** (2 * i / size)
            out[..., a] = head[..., a] * angle.cos() - head[..., b] * angle.sin()
            out[..., b] = head[..., b] * angle.cos() + head[..., a] * angle.sin()
        return out

    def attention(name, x):
        if f"{name}.c_attn.weight" in w:
            q, k, v = linear(f"{name}.c_attn", x).split(WIDTH, -1)
        else:
            q, k, v = (linear(f"{name}.{part}_proj", x) for part in "qkv")
        shared = WIDTH // k.shape[-1]
        heads = []
        for head in range(HEADS):
            own, other = slice(head * size, (head + 1) * size), slice(head // shared * size, (head // shared + 1) * size)
            scores = rotated(q[..., own]) @ rotated(k[..., other]).transpose(1, 2) / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[..., other])
        return linear(f"{name}.o_proj", torch.cat(heads, -1))

    def mlp(name, x):
        if scheme == "llama-simple":
            gate = linear(f"{name}.gate_proj", x)
            return linear(f"{name}.down_proj", gate * torch.sigmoid(gate) * linear(f"{name}.up_proj", x))
        return linear(f"{name}.down_proj", gelu(linear(f"{name}.c_fc", x)))

    x = w["wte.weight"][ids] + (w["wpe.weight"][:T] if gpt2 else 0)
    first, second = ("ln_1", "ln_2") if gpt2 else ("rms_1", "rms_2")
    for layer in range(LAYERS):
        x = x + attention(f"h.{layer}.attn", norm(f"h.{layer}.{first}", x))
        x = x + mlp(f"h.{layer}.mlp", norm(f"h.{layer}.{second}", x))
    return norm("ln_f", x) @ w["lm_head.weight"].T


def write(folder, case: str, form: str = "pt"):
    """A checkpoint folder as a training leaves it."""
    _, config, *_ = CASES[case]
    (folder / "model_config.yaml").write_text(yaml.safe_dump({"model_type": "LlamaSimpleMLP", **config}))
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"train_dataset_config": {"hf_tokenizer_path": "tokenizer"}}))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    state = weights(case)
    if form == "safetensors":
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
    else:
        (folder / "checkpoints").mkdir()
        torch.save({f"_orig_mod.{name}": value for name, value in state.items()}, folder / "checkpoints" / f"model_step_1000.{form}")
        torch.save({name: 0 * value for name, value in state.items()}, folder / "checkpoints" / f"model_step_200.{form}")
    return folder


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_description(case, tmp_path):
    scheme = CASES[case][0]
    before = torch.get_rng_state()
    target = targets.load(f"{scheme}:{write(tmp_path, case)}")
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    expected = by_hand(case, weights(case), ids)
    torch.testing.assert_close(target(ids).double(), expected, atol=1e-5, rtol=1e-5)
    assert (target.layers, target.width, target.context) == (LAYERS, WIDTH, CONTEXT)
    assert target.tokenizer.bos_token_id == 0
    gates = {"mlp.gate"} if scheme == "llama-simple" else set()
    assert {p.removeprefix("1.") for p in target.map_paths if p[0] == "1"} == {"mlp.up", "mlp.down", *(f"attn.{m}" for m in "qkvo")} | gates
    torch.testing.assert_close(target.weight("1.mlp.down"), weights(case)["h.1.mlp.down_proj.weight"], atol=0, rtol=0)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_every_file_form_gives_the_same_model(form, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = targets.load(f"llama-simple-mlp:{write(tmp_path / 'first', 'mlp')}")
    assert targets.load(f"llama-simple-mlp:{write(tmp_path / 'second', 'mlp', form)}").identity == first.identity


def test_a_tokenizer_file_in_the_folder_comes_first(tmp_path):
    folder = write(tmp_path, "mlp")
    (folder / "final_config.yaml").unlink()
    with pytest.raises(UserError, match=r"names no tokenizer: put tokenizer\.json there, or hf_tokenizer_path"):
        targets.load(f"llama-simple-mlp:{folder}")
    (folder / "final_config.yaml").write_text("data: {tokenizer_name: nobody/nothing}")
    with pytest.raises(UserError, match=r"cannot fetch the tokenizer 'nobody/nothing'.*without network put its tokenizer\.json into"):
        targets.load(f"llama-simple-mlp:{folder}")
    (folder / "tokenizer.json").write_text((folder / "tokenizer" / "tokenizer.json").read_text())
    assert targets.load(f"llama-simple-mlp:{folder}").tokenizer.eos_token == "<|bos|>"


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "model_config.yaml").unlink(), "no config file at"),
        (lambda f: (f / "model_config.yaml").write_text("n_layer: 2"), "model_config.yaml: 'vocab_size': Field required"),
        (lambda f: (f / "model_config.yaml").write_text(yaml.safe_dump({**LLAMA, "model_type": "GPT2Simple"})), "load it as gpt2-simple:"),
        (lambda f: (f / "model_config.yaml").write_text(yaml.safe_dump({**LLAMA, "n_layer": 3})), r"lack h\.2\.rms_1\.weight"),
        (lambda f: (f / "model_config.yaml").write_text(yaml.safe_dump({**LLAMA, "n_layer": 1})), r"hold h\.1\.attn"),
        (lambda f: (f / "model_config.yaml").write_text(yaml.safe_dump({**LLAMA, "vocab_size": 30})), r"do not fit model_config\.yaml"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), "cannot read"),
        (lambda f: torch.save(Trap(), f / "model_step_7.pt"), "cannot read .*model_step_7.pt"),
    ],
)
def test_what_is_wrong_is_one_line(spoil, says, tmp_path):
    folder = write(tmp_path, "mlp", "safetensors")
    spoil(folder)
    with pytest.raises(UserError, match=says) as error:
        targets.load(f"llama-simple-mlp:{folder}")
    assert "\n" not in str(error.value)


def test_a_run_that_cannot_be_had_is_one_line():
    with pytest.raises(UserError, match=r"cannot fetch goodfire/spd/t-9d2b8f02 from wandb.*local folder that holds model_config\.yaml"):
        targets.load("llama-simple-mlp:wandb:goodfire/spd/t-9d2b8f02")
    with pytest.raises(UserError, match=r"takes a folder with model_config\.yaml"):
        targets.load("gpt2-simple:/no/such/folder")
