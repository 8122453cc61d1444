"""new method NAME."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from decomp_bench.errors import UserError

METHOD = '''"""{title}: say in a line what the components are. A transcoder with a top-k gate stands here until you change it."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot


class {title}Config(MethodConfig):
    """Config keys of `{name}`, beside those of every trained method."""

    n: PositiveInt = 256
    """Components of each layer."""
    k: PositiveInt = 16
    """Components that are active at a position."""


class {title}(Decomposer):
    """Each MLP's output from its input: n directions, of which the k strongest are let through."""

    name = "{name}"
    summary = "what `list methods` says"
    Config = {title}Config
    kind = "replacement"
    trains_on = "activations"
    swept = ("k",)
    paper = ""
    config: {title}Config

    def build(self, generator: torch.Generator) -> None:
        self.read, self.write, self.bias = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for layer in self.layers:
            slot = Slot(f"{{layer}}.mlp.in", f"{{layer}}.mlp.out")
            self.sites.append(Site(f"{{layer}}.mlp", layer, gates_from=(slot.read,), slots=(slot,), n=self.config.n))
            width = self.target.size(slot.read)
            directions = torch.randn(self.config.n, width, generator=generator) * width**-0.5
            self.read[str(layer)] = nn.Parameter(directions)
            self.write[str(layer)] = nn.Parameter(torch.zeros_like(directions))
            self.bias[str(layer)] = nn.Parameter(torch.zeros(width))

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        found: Codes = {{}}
        for site in self.sites:
            read = site.slots[0].read
            if read in inputs:
                strength = torch.relu(inputs[read] @ self.read[str(site.layer)].T)
                gate = gates[site.name].gate if gates is not None else self._strongest(strength)
                found[site.name] = SiteCodes(strength, gate)
        return found

    def _strongest(self, strength: Tensor) -> Tensor:
        k = min(self.choice.k or self.config.k, self.config.n)
        chosen = torch.zeros_like(strength).scatter(-1, strength.topk(k, dim=-1).indices, 1.0)
        return chosen * (strength > 0)

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Tensor:
        layer = write.split(".")[0]
        return codes[f"{{layer}}.mlp"].value @ self.write[layer] + self.bias[layer]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        codes = self.encode(batch.clean)
        writes = [site.slots[0].write for site in self.sites]
        errors = [(self.decode(codes, write, batch.clean) - batch.clean[write]).square().mean() for write in writes]
        self._l0 = torch.stack([code.active.sum(-1).float().mean() for code in codes.values()]).mean().detach()
        return {{"reconstruction": torch.stack(errors).mean()}}

    def step_statistics(self) -> dict[str, Tensor]:
        return {{"l0": self._l0}}

    def component_sizes(self, site: Site) -> int:
        return 2 * self.target.size(site.slots[0].read)

    def constant_size(self, write: Point) -> int:
        return self.target.size(write)

    def directions(self, site: Site, slot: Slot) -> tuple[Tensor, Tensor]:
        return self.read[str(site.layer)], self.write[str(site.layer)]

    @property
    def variant(self) -> str:
        return f"k={{self.config.k}}"

    def sweep(self) -> list[Choice]:
        return [Choice(k=k) for k in (4, 8, 16, 32) if k <= self.config.n]
'''


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Begin something new: a method.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_nothing)
    group.command("method")(method)
    app.add_typer(group, name="new")


def _nothing() -> None:
    """Begin something new: a method."""


def method(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and underscores.")],
    directory: Annotated[Path | None, typer.Option("--dir", help="Folder for the file; default: the project's methods/.")] = None,
) -> None:
    """Write a working method into one file, ready to be changed."""
    from decomp_bench import registry

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"'{name}' is no name for a method: use lower-case letters, digits and underscores, such as my_method")
    if name in registry.names():
        raise UserError(f"method '{name}' exists already; take another name")
    own = Path("methods") if Path("methods").is_dir() and Path("pyproject.toml").is_file() else None
    folder = directory or own
    if folder is None:
        raise UserError("no methods/ folder here: change to the project's folder, or name one with --dir")
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path} exists already; take another name")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(METHOD.format(name=name, title="".join(part.capitalize() for part in name.split("_"))))
    found = folder.resolve() in (place.resolve() for place in registry._folders())
    variable = "" if found else f"DECOMP_BENCH_METHODS={folder.resolve()} "
    print(f"{path}\nnext: {variable}decomp-bench train {name} --target toy:resid_mlp1")
