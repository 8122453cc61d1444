"""Runs of stochastic and adversarial parameter decomposition (SPD, VPD) as their authors save them, read as a decomposer.

A run is a folder with `final_config.yaml` and `model_STEP.pth` (or `.safetensors`). Global networks take and give the maps in the order of
their sorted module paths; a transformer's inputs are normalised, as in the runs of the VPD paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from decomp_bench.config import parse, read_yaml
from decomp_bench.decomposer import Decomposer, layer_of
from decomp_bench.errors import UserError
from decomp_bench.interop._spd_run import CONFIG, HOLDS, About, Run, check_counts, newest, settings, some, weights
from decomp_bench.provenance import file_hash
from decomp_bench.registry import method
from decomp_bench.remote import wandb_folder

if TYPE_CHECKING:
    from decomp_bench.targets import TargetModel

METHOD = __name__.rpartition(".")[2]
"""The format carries the name of its method."""
CHOOSES_LAYERS = True
"""An import may leave out layers that were decomposed."""
_LAYER = re.compile(r"(?:.*\.)?(?:h|layers|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)")
_MAPS = {
    "mlp.up": ("c_fc", "up_proj", "fc_in", "dense_h_to_4h", "mlp_in"),
    "mlp.gate": ("gate_proj",),
    "mlp.down": ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "mlp_out"),
    "attn.q": ("q_proj",),
    "attn.k": ("k_proj",),
    "attn.v": ("v_proj",),
    "attn.o": ("o_proj", "out_proj", "c_proj"),
}


def read(source: str, target: TargetModel, layers: tuple[int, ...] | Literal["all"] | None = None) -> Decomposer:
    """The decomposition in a folder, or in `wandb:entity/project/run`, of a target; `layers`: only these of those decomposed.

    Raises UserError for a missing or broken file, another target, and whatever this project cannot represent.
    """
    return read_run(source, target, layers)[0]


def read_run(source: str, target: TargetModel, layers: tuple[int, ...] | Literal["all"] | None = None) -> tuple[Decomposer, dict[str, str]]:
    """As `read`, with the hashes of the files."""
    folder = wandb_folder(source, (CONFIG,), HOLDS, newest="model_*") if source.startswith("wandb:") else Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one that holds {HOLDS}, or wandb:ENTITY/PROJECT/RUN")
    run = weights(newest(folder))
    about = settings(read_yaml(folder / CONFIG), folder / CONFIG)
    check_counts(run, about, folder / CONFIG)
    points = _points(run, about, target, layers)
    chosen = tuple(sorted({layer_of(point) for point in points.values()}))
    kind = method(METHOD)
    sizes = {point: run.V[path].shape[1] for path, point in points.items()}
    config = {**about.config, **_widths(run, about, points), "components": sizes}
    made = kind(parse(kind.Config, config, str(folder / CONFIG)), target, chosen, about.seed)
    _fill(made, _state(run, about, points, made), run.file)
    return made.eval(), {file.name: file_hash(file) for file in (folder / CONFIG, run.file)}


# ---- places


def _points(run: Run, about: About, target: TargetModel, layers: tuple[int, ...] | Literal["all"] | None) -> dict[str, str]:
    """Module path of the run's target -> point, of the layers asked for; raises UserError for what is no matrix of this target."""
    wanted = None if layers is None or layers == "all" else target.layer_tuple(layers)
    own = {path: point for point, path in target.map_paths.items()}
    found: dict[str, str] = {}
    for path in sorted(run.V):
        point = own.get(path) or _canonical(path)
        if wanted is not None and (point is None or layer_of(point) not in wanted):
            continue
        found[path] = _checked(path, point, run, target)
    lacking = sorted(set(wanted or ()) - {layer_of(point) for point in found.values()})
    if lacking:
        raise UserError(f"{run.file} decomposes nothing in layer {', '.join(map(str, lacking))}")
    if run.everywhere and len(found) < len(run.V):
        raise UserError(f"importances of type {about.gate} read all {len(run.V)} decomposed matrices; read the run without choosing layers")
    return found


def _canonical(path: str) -> str | None:
    """The point that a module path of a usual architecture stands for."""
    found = _LAYER.fullmatch(path)
    if found is None:
        return None
    *inside, last = found["rest"].split(".")
    unit = "attn" if any("att" in part for part in inside) else "mlp"
    names = [name for name, lasts in _MAPS.items() if last in lasts and name.startswith(unit)]
    return f"{int(found['layer'])}.{names[0]}" if names else None


def _checked(path: str, point: str | None, run: Run, target: TargetModel) -> str:
    if path.endswith("pre_identity"):
        raise UserError(f"{run.file} decomposes an inserted identity, {path}, which is no matrix of the target; such a run cannot be read")
    if point is None or point not in target.map_paths:
        maps = ", ".join(sorted(target.architecture.maps))
        raise UserError(f"{run.file} decomposes {path}, which is no linear map inside a layer of {target.uri} ({maps}); "
                        "embeddings and fused maps cannot be read")
    weight, given = target.weight(point), run.weights.get(path)
    d_out, d_in = weight.shape
    if (len(run.V[path]), run.U[path].shape[1]) != (d_in, d_out):
        raise UserError(f"{run.file}: {path} maps {len(run.V[path])} to {run.U[path].shape[1]}, {point} of {target.uri} {d_in} to {d_out}: "
                        "the run decomposes another model")
    if given is not None and not any(_same(one, weight) for one in (given, given.T)):  # GPT-2 stores its matrices transposed
        raise UserError(f"{run.file}: the weights of {path} are not those of {target.uri}: the run decomposes another model")
    return point


def _same(given: Tensor, weight: Tensor) -> bool:
    weight = weight.detach().float().cpu()
    return given.shape == weight.shape and bool((given - weight).abs().max() <= 1e-3 * weight.abs().max())


# ---- networks


def _layers(tensors: dict[str, Tensor], start: str) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of an MLP's linear layers, in order; `start` is `layers.` or a block's `mlp.`."""
    numbers = [int(key[len(start) : -2]) for key in tensors if re.fullmatch(re.escape(start) + r"\d+\.W", key)]
    return [(tensors.pop(f"{start}{i}.W"), tensors.pop(f"{start}{i}.b")) for i in range(0, max(numbers, default=-1) + 1, 2)]


def _of_paper(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The scalar networks of the SPD paper's branch as C layers side by side: one hidden layer, or an affine map."""
    if "mlp_in" in tensors:
        inward = (tensors.pop("mlp_in")[:, None, :], tensors.pop("in_bias"))
        return [inward, (tensors.pop("mlp_out")[:, :, None], tensors.pop("out_bias")[:, None])]
    return [(tensors.pop("weight")[:, None, None], tensors.pop("bias")[:, None])]


def _network(run: Run, about: About, path: str) -> list[tuple[Tensor, Tensor]]:
    """The layers of one map's own network; raises UserError where it is not of the kind that the config names."""
    tensors = dict(run.gates.get(path, {}))
    try:
        found = _of_paper(tensors) if about.gate == "scalar" and "layers.0.W" not in tensors else _layers(tensors, "layers.")
    except KeyError as error:
        raise UserError(f"{run.file}: the importances of {path} lack {error}; fetch the run again") from None
    if tensors or not found or any(w.dim() != (2 if about.gate == "shared_mlp" else 3) for w, _ in found):
        wrong = some(tensors) or ("their shapes differ" if found else "there are none")
        raise UserError(f"{run.file}: the importances of {path} are not of type {about.gate}: {wrong}")
    return found


def _widths(run: Run, about: About, points: dict[str, str]) -> dict[str, Any]:
    """Hidden widths of the networks, which the tensors say in every version."""
    if about.gate == "global_shared_transformer":
        hidden = [w.shape[-1] for w, _ in _layers(dict(run.everywhere), "_blocks.0.mlp.")][:-1]
        return {"gate_hidden": hidden} if hidden else {}
    layers = _layers(dict(run.everywhere), "layers.") if about.gate == "global_shared_mlp" else _network(run, about, next(iter(points)))
    return {"gate_hidden": [w.shape[-1] for w, _ in layers[:-1]]}


def _state(run: Run, about: About, points: dict[str, str], made: Decomposer) -> dict[str, Tensor]:
    """The run's tensors under our names."""
    state: dict[str, Tensor] = {"gates.all.scale": torch.ones(())} if about.gate == "global_shared_mlp" else {}
    for path, point in points.items():
        name = point.replace(".", "_")
        state |= {f"parts.{name}.V": run.V[path], f"parts.{name}.U": run.U[path]}
        if run.everywhere or about.gate.startswith("global"):
            continue
        network = _network(run, about, path)
        if about.gate == "shared_mlp":
            state[f"gates.{name}.scale"] = torch.ones(())
            *hidden, (w, b) = network
            state |= _linears(f"gates.{name}.hidden", hidden) | _linear(f"gates.{name}.out.{name}", w, b)
        else:
            state |= {f"gates.{name}.{kind}.{i}": pair[k] for i, pair in enumerate(network) for k, kind in enumerate(("weights", "biases"))}
    return state | (_everywhere(run, points, made) if about.gate.startswith("global") else {})


def _everywhere(run: Run, points: dict[str, str], made: Decomposer) -> dict[str, Tensor]:
    """A global network, its inputs reordered from sorted module paths to our sites and its outputs split by site."""
    tensors, target = dict(run.everywhere), made.target
    try:
        if "_input_projector.W" in tensors:
            hidden, outward = [], (tensors.pop("_output_head.W"), tensors.pop("_output_head.b"))
            inward = (tensors.pop("_input_projector.W"), tensors.pop("_input_projector.b"))
        else:
            *hidden, outward = _layers(tensors, "layers.")
            inward = hidden[0] if hidden else outward
        blocks = {int(found[1]) for key in tensors if (found := re.match(r"_blocks\.(\d+)\.", key))}
        state = {key: value for i in sorted(blocks) for key, value in _block(tensors, i).items()}
    except (KeyError, ValueError) as error:
        raise UserError(f"{run.file}: the global importances lack {error}; fetch the run again") from None
    unknown = [key for key in tensors if not key.endswith("rope.inv_freq")]
    widths, order = [target.size(point) for point in points.values()], list(points.values())
    if unknown or len(inward[0]) != sum(widths) or outward[0].shape[1] != sum(len(run.U[path]) for path in points):
        raise UserError(f"{run.file}: the global importances do not fit the decomposed matrices: {some(unknown) or 'sizes differ'}")
    blocks_in = dict(zip(order, inward[0].split(widths), strict=True))
    turned = (torch.cat([blocks_in[site.name] for site in made.sites]), inward[1])
    if "_input_projector.W" in run.everywhere:
        state |= _linear("gates.all.inward", *turned)
    elif hidden:
        state |= _linears("gates.all.hidden", [turned, *hidden[1:]])
    else:
        outward = turned
    counts = [len(run.U[path]) for path in points]
    for point, w, b in zip(order, outward[0].split(counts, 1), outward[1].split(counts), strict=True):
        state |= _linear(f"gates.all.out.{point.replace('.', '_')}", w, b)
    return state


def _block(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One block of a transformer under our names."""
    start, ours = f"_blocks.{i}.", f"gates.all.blocks.{i}."
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    *hidden, (w, b) = _layers(tensors, f"{start}mlp.")
    state = {f"{ours}{one}.weight": tensors.pop(f"{start}attn.{name}.weight") for one, name in names.items()}
    return state | _linears(f"{ours}hidden", hidden) | _linear(f"{ours}out", w, b)


def _linear(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """A layer x W + b as torch keeps it."""
    return {f"{name}.weight": weight.T, f"{name}.bias": bias}


def _linears(name: str, layers: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {key: value for i, (w, b) in enumerate(layers) for key, value in _linear(f"{name}.{i}", w, b).items()}


def _fill(made: Decomposer, state: dict[str, Tensor], file: Path) -> None:
    wanted = made.state_dict()
    wrong = sorted(key for key in wanted.keys() | state.keys()
                   if key not in wanted or key not in state or wanted[key].shape != state[key].shape)
    if wrong:
        raise UserError(f"{file}: config and weights do not fit each other at {some(wrong)}; fetch the run again")
    made.load_state_dict(state)
