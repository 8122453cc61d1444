"""Checkpoints of the small language models that Goodfire publishes with its parameter decompositions, as Hugging Face models.

LlamaSimpleMLP, LlamaSimple and GPT2Simple of goodfire-ai/spd, goodfire-ai/param-decomp and simple_stories_train: a folder (or wandb run)
with model_config.yaml and a state dict. They compute what Arcee with the tanh GELU, Llama and GPT-2 compute.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from decomp_bench.config import read_yaml
from decomp_bench.errors import UserError
from decomp_bench.targets.architectures import LAYOUTS
from decomp_bench.targets.base import TargetModel, identity_of
from decomp_bench.targets.huggingface import Loaded, as_target
from decomp_bench.targets.tokenizers import tokenizer_of

CONFIG = "model_config.yaml"
RUN_CONFIG = "final_config.yaml"
_HOLDS = f"{CONFIG} and a state dict (.safetensors, .pt or .pth)"
_TYPES = {"llama-simple-mlp": "LlamaSimpleMLP", "llama-simple": "LlamaSimple", "gpt2-simple": "GPT2Simple"}


class SimpleConfig(BaseModel):
    """The keys of model_config.yaml that decide the function, with the classes' defaults; others do not change it."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_type: str | None = None
    block_size: PositiveInt = 1024
    vocab_size: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    n_ctx: PositiveInt = 1024
    n_key_value_heads: PositiveInt = 3
    use_grouped_query_attention: bool = True
    rotary_adjacent_pairs: bool = False
    rotary_base: PositiveFloat = 10000
    rms_norm_eps: PositiveFloat = 1e-6

    @property
    def kv_heads(self) -> int:
        return self.n_key_value_heads if self.use_grouped_query_attention else self.n_head


def load_simple(scheme: str, name: str, uri: str, device: str | torch.device) -> TargetModel:
    """Load `SCHEME:FOLDER` or `SCHEME:wandb:entity/project/run`; raises UserError for whatever is missing, broken or does not fit.

    The identity is that of the converted model's weights.
    """
    folder = _folder(name, scheme)
    config = _config(folder, scheme)
    state = _state(_weights(folder))
    try:
        converted = _gpt2(config, state) if scheme == "gpt2-simple" else _llama(config, state, gated=scheme == "llama-simple")
    except KeyError as error:
        raise UserError(f"the weights in {folder} lack {error.args[0]}: they are not those of a {_TYPES[scheme]}") from None
    if state:
        raise UserError(f"the weights in {folder} hold {', '.join(sorted(state)[:3])}, which a {_TYPES[scheme]} does not have")
    model = _build(*converted, folder)
    found = Loaded(model, tokenizer_of(folder, (CONFIG, RUN_CONFIG)), LAYOUTS[model.config.model_type], identity_of(model))
    return as_target(found, name, uri, device)


def _folder(name: str, scheme: str) -> Path:
    if name.startswith("wandb:"):
        from decomp_bench.remote import wandb_folder

        return wandb_folder(name, [CONFIG, RUN_CONFIG], _HOLDS, newest="model_step_*.pt", optional=["tokenizer*.json"])
    folder = Path(os.path.expandvars(name)).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; '{scheme}:' takes a folder with {_HOLDS}, or wandb:ENTITY/PROJECT/RUN")
    return folder


def _config(folder: Path, scheme: str) -> SimpleConfig:
    try:
        config = SimpleConfig.model_validate(read_yaml(folder / CONFIG))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder / CONFIG}: '{'.'.join(map(str, first['loc']))}': {first['msg']}") from None
    if config.model_type and config.model_type.lower() != _TYPES[scheme].lower():
        right = next((s for s, kind in _TYPES.items() if kind.lower() == config.model_type.lower()), None)
        hint = f": load it as {right}:{folder}" if right else ""
        raise UserError(f"{folder} holds a {config.model_type}, not a {_TYPES[scheme]}{hint}")
    return config


def _weights(folder: Path) -> Path:
    """The state dict of the largest step in a folder, or in its checkpoints/."""
    files = [file for place in (folder, folder / "checkpoints") for end in ("safetensors", "pt", "pth") for file in place.glob(f"*.{end}")]
    if not files:
        raise UserError(f"{folder} holds no weights: it needs {_HOLDS}")

    def step(file: Path) -> int:
        return int((re.findall(r"\d+", file.stem) or ["0"])[-1])

    return max(sorted(files), key=step)


def _state(file: Path) -> dict[str, Tensor]:
    """A state dict in fp32, without wrappers' prefixes and without attention masks and rotary tables."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        named = {re.sub(r"^((_orig_mod|module|transformer)\.)+", "", key): value.float() for key, value in state.items()}
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"cannot read {file} ({reason}): it must be a state dict of tensors, saved by torch.save or safetensors") from None
    return {key: v for key, v in named.items() if not re.search(r"attn\.(rotary_(sin|cos)|bias)$", key)}


def _llama(config: SimpleConfig, state: dict[str, Tensor], *, gated: bool) -> tuple[Any, dict[str, Tensor]]:
    """Config and state dict of a Llama (gated) or Arcee model; takes what it uses out of `state`."""
    from transformers import ArceeConfig, LlamaConfig

    taken = {"model.embed_tokens.weight": state.pop("wte.weight"), "model.norm.weight": state.pop("ln_f.weight")}
    tied = _head(state, taken, taken["model.embed_tokens.weight"])
    names = {"down_proj": "down_proj", **({"gate_proj": "gate_proj", "up_proj": "up_proj"} if gated else {"c_fc": "up_proj"})}
    for layer in range(config.n_layer):
        old, new = f"h.{layer}", f"model.layers.{layer}"
        taken[f"{new}.input_layernorm.weight"] = state.pop(f"{old}.rms_1.weight")
        taken[f"{new}.post_attention_layernorm.weight"] = state.pop(f"{old}.rms_2.weight")
        _take(state, taken, {f"{old}.mlp.{theirs}": f"{new}.mlp.{ours}" for theirs, ours in names.items()})
        _unfuse(state, f"{old}.attn")
        _take(state, taken, {f"{old}.attn.{part}_proj": f"{new}.self_attn.{part}_proj" for part in "qkvo"})
        if config.rotary_adjacent_pairs:
            for part, heads in (("q", config.n_head), ("k", config.kv_heads)):
                for end in ("weight", "bias"):
                    key = f"{new}.self_attn.{part}_proj.{end}"
                    if key in taken:
                        taken[key] = _halves(taken[key], heads)
    made = (LlamaConfig if gated else ArceeConfig)(
        hidden_act="silu" if gated else "gelu_new",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=len(taken[f"model.layers.0.mlp.{'gate' if gated else 'up'}_proj.weight"]),
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=min(config.block_size, config.n_ctx),
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_base)},
        attention_bias="model.layers.0.self_attn.q_proj.bias" in taken,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in taken,
        tie_word_embeddings=tied,
    )
    return made, taken


def _gpt2(config: SimpleConfig, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Config and state dict of a GPT-2 model; takes what it uses out of `state`."""
    from transformers import GPT2Config

    taken = {f"transformer.{key}.weight": state.pop(f"{key}.weight") for key in ("wte", "wpe")}
    tied = _head(state, taken, taken["transformer.wte.weight"])
    _take(state, taken, {"ln_f": "transformer.ln_f"})
    for layer in range(config.n_layer):
        old, new = f"h.{layer}", f"transformer.h.{layer}"
        _take(state, taken, {f"{old}.{norm}": f"{new}.{norm}" for norm in ("ln_1", "ln_2")})
        for end in ("weight", "bias"):
            state[f"{old}.attn.c_attn.{end}"] = torch.cat([state.pop(f"{old}.attn.{part}_proj.{end}") for part in "qkv"])
        maps = {"attn.c_attn": "attn.c_attn", "attn.o_proj": "attn.c_proj", "mlp.c_fc": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
        for theirs, ours in maps.items():
            taken[f"{new}.{ours}.weight"] = state.pop(f"{old}.{theirs}.weight").T.contiguous()
            taken[f"{new}.{ours}.bias"] = state.pop(f"{old}.{theirs}.bias")
    made = GPT2Config(
        activation_function="gelu_new",
        vocab_size=config.vocab_size,
        n_embd=config.n_embd,
        n_inner=taken["transformer.h.0.mlp.c_fc.weight"].shape[1],
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_positions=config.block_size,
        layer_norm_epsilon=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    return made, taken


def _take(state: dict[str, Tensor], taken: dict[str, Tensor], names: dict[str, str]) -> None:
    """Move weights, and biases where there are any, under new module names."""
    for theirs, ours in names.items():
        taken[f"{ours}.weight"] = state.pop(f"{theirs}.weight")
        if f"{theirs}.bias" in state:
            taken[f"{ours}.bias"] = state.pop(f"{theirs}.bias")


def _head(state: dict[str, Tensor], taken: dict[str, Tensor], embedding: Tensor) -> bool:
    """Move the output head where it is one of its own; whether it is tied to the embedding."""
    head = state.pop("lm_head.weight", embedding)
    tied = torch.equal(head, embedding)
    if not tied:
        taken["lm_head.weight"] = head
    return tied


def _unfuse(state: dict[str, Tensor], attn: str) -> None:
    """A model without grouped queries keeps q, k and v in one matrix."""
    for end in ("weight", "bias"):
        if f"{attn}.c_attn.{end}" in state:
            for part, value in zip("qkv", state.pop(f"{attn}.c_attn.{end}").chunk(3), strict=True):
                state[f"{attn}.{part}_proj.{end}"] = value.contiguous()


def _halves(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k reordered in each head, from rotated pairs (0, 1), (2, 3), ... to pairs (0, d/2), (1, d/2 + 1), ...

    Both are reordered alike, so their products, and the attention, stay what they were.
    """
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _build(config: Any, state: dict[str, Tensor], folder: Path) -> Any:
    """A model of these weights; the global generator is left as it was."""
    from transformers import AutoModelForCausalLM

    maker: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = maker.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the weights in {folder} do not fit {CONFIG}: {first}") from None
    missing = [key for key in missing if not (key == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or unexpected:
        raise UserError(f"the weights in {folder} do not fit {CONFIG}: {', '.join([*missing, *unexpected][:3])}")
    model.tie_weights()
    return model.eval()
