"""A Llama or Arcee forward written out from the weights in float64, and SPD on it with explicit masked matrices: no code of the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

Maps = Callable[[str, Tensor], Tensor]
"""(point of a linear map such as `1.mlp.up`, its input [B, T, d_in]) -> its output."""


class Model:
    """Forward pass of a checkpoint folder. `clean[point]` after a run: what each MLP read and wrote (`1.mlp.in`, `1.mlp.out`)."""

    def __init__(self, folder: Path) -> None:
        self.weights = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.heads, self.eps = config["num_hidden_layers"], config["num_attention_heads"], config["rms_norm_eps"]
        self.gated = config["model_type"] == "llama"
        rope = config.get("rope_parameters") or config
        self.base = rope["rope_theta"]
        self.maps = ["gate", "up", "down"] if self.gated else ["up", "down"]

    def matrix(self, point: str) -> Tensor:
        """The weight [d_out, d_in] of `1.mlp.up`."""
        layer, _, name = point.split(".")
        return self.weights[f"model.layers.{layer}.mlp.{name}_proj.weight"]

    def own(self, point: str, x: Tensor) -> Tensor:
        """The model's own map."""
        return x @ self.matrix(point).T

    def mlp(self, layer: int, x: Tensor, maps: Maps) -> Tensor:
        """The MLP of a layer with these linear maps."""
        up = maps(f"{layer}.mlp.up", x) if not self.gated else None
        if self.gated:
            gate = maps(f"{layer}.mlp.gate", x)
            hidden = gate * torch.sigmoid(gate) * maps(f"{layer}.mlp.up", x)
        else:
            hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return maps(f"{layer}.mlp.down", hidden)

    def __call__(self, ids: Tensor, mlp: Callable[[int, Tensor], Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of full rows [B, T], and what each MLP read and wrote; `mlp(layer, x)` stands in for the MLPs."""
        mlp = mlp or (lambda layer, x: self.mlp(layer, x, self.own))
        embed = self.weights["model.embed_tokens.weight"]
        x, seen = embed[ids], {}
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            x = x + self._attention(name, self._norm(x, name + "input_layernorm.weight"))
            read = self._norm(x, name + "post_attention_layernorm.weight")
            wrote = mlp(layer, read)
            seen[f"{layer}.mlp.in"], seen[f"{layer}.mlp.out"] = read, wrote
            x = x + wrote
        return self._norm(x, "model.norm.weight") @ embed.T, seen

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[name]

    def _attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = (self._heads(x @ self.weights[f"{name}self_attn.{part}_proj.weight"].T) for part in "qkv")
        q, k = self._rotated(q), self._rotated(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2) @ self.weights[f"{name}self_attn.o_proj.weight"].T

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2]).double()[:, None] * self.base ** (-torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class SPD:
    """An SPD checkpoint folder on a `Model`: gates from its weights, W-hat of each position as an explicit matrix."""

    def __init__(self, folder: Path, model: Model, everything: bool = False, delta: bool = False) -> None:
        self.state = {key: value.double() for key, value in load_file(folder / "decomposer.safetensors").items()}
        about = json.loads((folder / "decomposer.json").read_text())
        self.shared, self.layers, self.model = about["config"]["gate"] == "shared", about["layers"], model
        self.everything, self.delta = everything, delta

    def gate(self, point: str, x: Tensor, unit_input: Tensor) -> Tensor:
        """Which components are on [B, T, C], given the map's input and what the MLP reads."""
        key, unit = point.replace(".", "_"), point.rpartition(".")[0].replace(".", "_")
        if self.shared:
            get = lambda name: self.state[f"gates.{unit}.{name}"]
            hidden = F.gelu((unit_input * get("scale")) @ get("hidden.0.weight").T + get("hidden.0.bias"))
            logit = hidden @ get(f"out.{key}.weight").T + get(f"out.{key}.bias")
        else:
            get = lambda name: self.state[f"gates.{key}.{name}"]
            inner = (x @ self.state[f"parts.{key}.V"])[..., None]
            hidden = F.gelu(inner * get("weights.0")[:, 0] + get("biases.0"))
            logit = (hidden * get("weights.1")[..., 0]).sum(-1) + get("biases.1")[:, 0]
        return torch.ones_like(logit) if self.everything else (logit > 0).double()

    def masked(self, point: str, x: Tensor, gate: Tensor) -> Tensor:
        """x through sum_c m_c V_c U_c (plus W - V U with delta on), a matrix of its own for each position; position 0 keeps W."""
        key, own = point.replace(".", "_"), self.model.matrix(point).T
        V, U = self.state[f"parts.{key}.V"], self.state[f"parts.{key}.U"]
        matrices = torch.einsum("dc,btc,co->btdo", V, gate, U) + (own - V @ U) * self.delta
        matrices[:, 0] = own
        return torch.einsum("btd,btdo->bto", x, matrices)

    def run(self, ids: Tensor, protocol: str, gates: str, layers: list[int]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, MLP outputs by layer and gates by map, with these layers replaced."""
        _, clean = self.model(ids)
        hidden, found = {}, {}
        for layer in self.layers:
            self.model.mlp(layer, clean[f"{layer}.mlp.in"], lambda p, x: self._noted(p, x, hidden))

        def mlp(layer: int, x: Tensor) -> Tensor:
            if layer not in layers:
                return self.model.mlp(layer, x, self.model.own)
            x = x if protocol == "cascading" else clean[f"{layer}.mlp.in"]

            def maps(point: str, value: Tensor) -> Tensor:
                source = (value, x) if gates == "self" else (hidden[point], clean[f"{layer}.mlp.in"])
                found[point] = self.gate(point, *source)
                return self.masked(point, value, found[point])

            return self.model.mlp(layer, x, maps)

        logits, seen = self.model(ids, mlp)
        return logits, {str(layer): seen[f"{layer}.mlp.out"] for layer in layers}, found

    def _noted(self, point: str, x: Tensor, where: dict[str, Tensor]) -> Tensor:
        where[point] = x
        return self.model.own(point, x)


def full_rows(tokens, length) -> list[Tensor]:
    """Rows without their padding, gathered by length: [B, T] each."""
    tokens, length = torch.as_tensor(tokens).long(), torch.as_tensor(length).long()
    return [tokens[length == n][:, :n] for n in length.unique().tolist()]


def mean_outputs(model: Model, rows: list[Tensor]) -> dict[str, Tensor]:
    """Mean output of each layer's MLP over every position but the first of each row."""
    seen = [model(ids)[1] for ids in rows]
    return {str(m): torch.cat([s[f"{m}.mlp.out"][:, 1:].flatten(0, 1) for s in seen]).mean(0) for m in range(model.layers)}


def spd_scores(spd: SPD, rows: list[Tensor], means: dict[str, Tensor], protocol: str, gates: str) -> dict[tuple[str, str], float]:
    """(metric, layer or site) -> value, each from its definition: KL, CE, FVU and L0 of every map."""
    parts = [[layer] for layer in spd.layers] if protocol == "single" else [spd.layers]
    kl, ce, targets, positions = [0.0] * len(parts), [0.0] * len(parts), 0, 0
    error, variance, active = {}, {}, {}
    add = lambda where, key, value: where.__setitem__(key, where.get(key, 0.0) + float(value))
    for ids in rows:
        clean_logits, clean = spd.model(ids)
        reference = clean_logits.log_softmax(-1)[:, 1:-1]
        targets, positions = targets + reference[..., 0].numel(), positions + ids[:, 1:].numel()
        for i, layers in enumerate(parts):
            logits, outputs, found = spd.run(ids, protocol, gates, layers)
            logp = logits.log_softmax(-1)[:, 1:-1]
            kl[i] += float((reference.exp() * (reference - logp)).sum())
            ce[i] -= float(logp.gather(-1, ids[:, 2:, None]).sum())
            for layer, value in outputs.items():
                y = clean[f"{layer}.mlp.out"]
                add(error, layer, (y - value)[:, 1:].square().sum())
                add(variance, layer, (y - means[layer])[:, 1:].square().sum())
            for point, gate in found.items():
                add(active, point, gate[:, 1:].sum())
    fvu = {layer: error[layer] / variance[layer] for layer in error}
    scores = {("fvu", layer): value for layer, value in fvu.items()} | {("fvu", "all"): sum(fvu.values()) / len(fvu)}
    scores |= {("kl", "all"): sum(kl) / len(parts) / targets, ("ce", "all"): sum(ce) / len(parts) / targets}
    return scores | {("l0_module", point): value / positions for point, value in active.items()}
