"""What a saved run of parameter decomposition consists of: its tensors by module path of its target, and its settings by our names.

The state dict is that of the component model (github.com/goodfire-ai/spd: the SPD paper's branch, then main; then
github.com/goodfire-ai/param-decomp while it was torch):

    _components.h-0-mlp-c_fc.V [d_in, C], .U [C, d_out]         paper: components.PATH.A and .B; then patched_model.PATH.components.V
    ci_fn._ci_fns.h-0-mlp-c_fc.layers.0.W ...                   one network a map; before: _ci_fns, _gates; paper: gates.PATH.mlp_in ...
    ci_fn._global_ci_fn.layers.0.W ...                          one MLP for all maps
    ci_fn._global_ci_fn._input_projector.W, ._blocks.0.attn.q_proj.weight, ._blocks.0.mlp.0.W, ._output_head.W ...    a transformer
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from decomp_bench.errors import UserError

CONFIG = "final_config.yaml"
HOLDS = f"{CONFIG} and model_STEP.pth"
_STEP = re.compile(r"model_(\d+)\.(?:pth|safetensors)")
_KEYS = {  # where a tensor of the state dict belongs -> its name
    "V": r"_?components\.(?P<path>[^.]+)\.[VA]|(?:target_model|patched_model|model)\.(?P<dotted>.+)\.components\.V",
    "U": r"_?components\.(?P<path>[^.]+)\.[UB]|(?:target_model|patched_model|model)\.(?P<dotted>.+)\.components\.U",
    "gates": r"(?:ci_fn\._ci_fns|_ci_fns|_gates|gates)\.(?P<path>[^.]+)\.(?P<leaf>.+)",
    "everywhere": r"ci_fn\._global_ci_fn\.(?P<leaf>.+)",
    "weights": r"(?:target_model|patched_model|model)\.(?P<dotted>.+?)(?:\.original)?\.weight",
    "known": r"(?:target_model|patched_model|model)\..+|_?components\.[^.]+\.bias",
}
_LOSSES = {  # a loss' class and the paper's coefficient -> what its weight is called here
    "faithfulness": ("FaithfulnessLoss", "faithfulness_coeff"),
    "importance": ("ImportanceMinimalityLoss", "importance_minimality_coeff"),
    "stochastic": ("StochasticReconLoss", "stochastic_recon_coeff"),
    "layerwise": ("StochasticReconLayerwiseLoss", "stochastic_recon_layerwise_coeff"),
    "subset": ("StochasticReconSubsetLoss", None),
}
_IMPORTANCE = {
    "p": "pnorm", "p_end": "p_anneal_final_p", "anneal_from": "p_anneal_start_frac", "anneal_to": "p_anneal_end_frac", "beta": "beta",
    "p_eps": "eps",
}


@dataclass
class Run:
    """The tensors of a run, by module path of its target."""

    file: Path
    V: dict[str, Tensor] = field(default_factory=dict)
    U: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    everywhere: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def newest(folder: Path) -> Path:
    steps = {int(found[1]): path for path in folder.iterdir() if (found := _STEP.fullmatch(path.name))}
    if not steps:
        raise UserError(f"{folder} has no model_STEP.pth or model_STEP.safetensors; it needs {HOLDS}")
    return steps[max(steps)]


def weights(file: Path) -> Run:
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        tensors = {str(key): value.float() for key, value in state.items() if value.is_floating_point()}
    except Exception as error:
        raise UserError(f"{file} is not a state dict of tensors ({type(error).__name__}); fetch the run again") from None
    run, unexpected = Run(file), []
    for key, value in tensors.items():
        if not _sort(run, key, value):
            unexpected.append(key)
    if unexpected:
        raise UserError(f"{file}: unexpected tensors {some(unexpected)}; the run is of a version that is not known")
    if not run.V or run.V.keys() != run.U.keys():
        raise UserError(f"{file}: components lack V or U: {some(run.V.keys() ^ run.U.keys()) or 'there are none at all'}")
    return run


def _sort(run: Run, key: str, value: Tensor) -> bool:
    """Put a tensor where it belongs; False where it belongs nowhere."""
    for where, pattern in _KEYS.items():
        found = re.fullmatch(pattern, key)
        if found is None:
            continue
        names = found.groupdict()
        path = names.get("dotted") or (names.get("path") or "").replace("-", ".")
        if where == "gates":
            run.gates.setdefault(path, {})[names["leaf"]] = value
        elif where == "everywhere":
            run.everywhere[names["leaf"]] = value
        elif where != "known":
            getattr(run, where)[path] = value
        return True
    return False


# ---- settings


@dataclass
class About:
    """What a run's config says: the gate's kind, components of each module pattern, and settings by our names."""

    gate: str
    counts: list[tuple[str, int]]
    config: dict[str, Any]
    seed: int


def settings(raw: dict[str, Any], file: Path) -> About:
    nested = raw.get("pd")
    data: dict[str, Any] = nested if isinstance(nested, dict) else raw  # later versions keep the method's settings apart
    try:
        gate, network = _gate(data)
        counts = data.get("module_info") or data.get("decomposition_targets")
        if counts is None:
            counts = [{"module_pattern": pattern, "C": data["C"]} for pattern in data["target_module_patterns"]]
        identity = any(data.get(f"identity_{name}") for name in ("module_info", "module_patterns", "decomposition_targets"))
        pairs = [(str(one["module_pattern"]), int(one["C"])) for one in counts]
        training = _training(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not the config of an SPD or VPD run: {type(error).__name__} at {error}") from None
    if identity:
        raise UserError(f"{file}: the run decomposes inserted identities, which are no matrices of the target; such a run cannot be read")
    sigmoid = data.get("sigmoid_type", "leaky_hard")
    if sigmoid != "leaky_hard":
        raise UserError(f"{file}: sigmoid_type '{sigmoid}' has no gates that are exactly 0 or at most 1; only leaky_hard can be read")
    paper = "n_ci_mlp_neurons" in data or ("gate_type" in data and "sigmoid_type" not in data)
    config = {
        "gate": gate, "init": "random", "gate_bias": 0.0, "sigmoid": "leaky" if paper else "straight_through", "penalty": "lp",
        "delta": bool(data.get("use_delta_component", not paper)), "threshold": float(data.get("ci_alive_threshold") or 0.0),
    }  # fmt: skip
    return About(gate, pairs, config | network | training, int(data.get("seed", 0)))


def _gate(data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind of the network that gives importances, and the settings of a transformer."""
    if "n_ci_mlp_neurons" in data:
        return "scalar", {}
    one: dict[str, Any] | None = data.get("ci_config")
    if one is None:
        older = str(data.get("ci_fn_type", data.get("gate_type", "vector_mlp")))
        one = {"fn_type": "global_shared_mlp" if data.get("use_global_ci") and not older.startswith("global_") else older}
    kind = "scalar" if one["fn_type"] == "mlp" else one["fn_type"]
    if kind not in ("scalar", "vector_mlp", "shared_mlp", "global_shared_mlp", "global_shared_transformer"):
        raise UserError(f"causal-importance networks of type '{kind}' are not known")
    if extra := one.get("extra_input_module_patterns"):
        raise UserError(f"the importances read {some(extra)}, which are not decomposed; such a run cannot be read")
    if kind != "global_shared_transformer":
        return kind, {}
    cfg = one["simple_transformer_ci_cfg"]
    attention = cfg["attn_config"]
    rope = float(attention.get("rope_base", 10_000.0))
    return kind, {"gate_width": cfg["d_model"], "gate_blocks": cfg["n_blocks"], "gate_heads": attention["n_heads"], "gate_rope": rope}


def _training(data: dict[str, Any]) -> dict[str, Any]:
    """How the run was trained, as far as there are words for it here; losses that it did not have get no weight."""
    losses = data.get("loss_metric_configs") or data.get("loss_metrics") or []
    by_class = {one.get("classname", one.get("type")): one for one in losses}
    found: dict[str, Any] = {"steps": data["steps"], "batch": data["batch_size"], "samples": data.get("n_mask_samples") or 1}
    for name, (loss, coefficient) in _LOSSES.items():
        found[name] = float(by_class.get(loss, {}).get("coeff") or data.get(coefficient or "") or 0.0)
    importance = by_class.get("ImportanceMinimalityLoss", data)
    found |= {ours: importance[theirs] for ours, theirs in _IMPORTANCE.items() if importance.get(theirs) is not None}
    if found.get("anneal_from", 0.0) >= 1 or found.get("anneal_to", 1.0) <= 0:
        found |= {"anneal_from": 0.0, "anneal_to": 1.0, "p_end": None}  # no annealing
    return found


def check_counts(run: Run, about: About, file: Path) -> None:
    for path, V in run.V.items():
        named = [count for pattern, count in about.counts if fnmatchcase(path, pattern)]
        if not named and not path.endswith(".pre_identity"):
            raise UserError(f"{file} names no components for {path}, which the weights have; config and weights are of different runs")
        if named and V.shape[1] not in named:
            raise UserError(f"{file} gives {path} C={named[0]}, the weights {V.shape[1]}; config and weights are of different runs")
    idle = [pattern for pattern, _ in about.counts if not any(fnmatchcase(path, pattern) for path in run.V)]
    if idle:
        raise UserError(f"{run.file} has no components for {some(idle)}, which the config names; fetch the run again")


def some(names: Iterable[str]) -> str:
    """The first few names of many."""
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
