"""Floor: singular components of each MLP matrix, or principal components of each MLP's output, the strongest of each row kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot
from decomp_bench.targets import TargetModel

from ._sparse import top_of_rows
from .neurons import FloorConfig, geometric


class SVDConfig(FloorConfig):
    """Config of the linear floor."""

    kind: Literal["replacement", "autoencoding"] = "replacement"
    """replacement: singular components of every MLP matrix; autoencoding: principal components of the MLP's output, which it sees."""
    calibration: PositiveInt = 16_384
    """Training rows from which principal components are computed."""


class Bank(nn.Module):
    """Rank-one components of a linear map: y = sum of (reader . (x - centre)) writer + bias over the components kept."""

    reader: Tensor
    writer: Tensor
    centre: Tensor
    bias: Tensor

    def __init__(self, reader: Float[Tensor, "n d_in"], writer: Float[Tensor, "n d_out"], bias: Float[Tensor, " d_out"] | None) -> None:
        super().__init__()
        self.has_bias = bias is not None
        self.register_buffer("reader", reader)
        self.register_buffer("writer", writer)
        self.register_buffer("centre", reader.new_zeros(reader.shape[1]))
        self.register_buffer("bias", reader.new_zeros(writer.shape[1]) if bias is None else bias.clone())

    @staticmethod
    def of_map(weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None) -> Bank:
        """Singular components of a linear map."""
        u, s, v = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
        return Bank((s[:, None] * v).to(weight), u.T.contiguous().to(weight), bias)

    @torch.no_grad()
    def take_principal(self, y: Float[Tensor, "rows d"]) -> None:
        """Become the principal components of data around its mean."""
        y = y.to("cpu", torch.float64)
        mean = y.mean(0)
        centred = y - mean
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T
        for own, value in ((self.reader, basis), (self.writer, basis), (self.centre, mean), (self.bias, mean)):
            own.copy_(value)


class SVD(Decomposer):
    """As a replacement, a site for each MLP matrix; as an autoencoder, a site for each MLP output. Top k by |strength|."""

    name = "svd"
    summary = "floor: singular components of MLP matrices, or principal components of MLP outputs"
    Config = SVDConfig
    config: SVDConfig  # type: ignore[assignment]
    trainable = False
    swept = ("k",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {}, "laptop": {}, "paper": {}}

    def build(self, generator: torch.Generator) -> None:
        self.kind = self.config.kind  # type: ignore[misc]
        self.banks = nn.ModuleDict()
        for layer in self.layers:
            if self.kind == "autoencoding":
                basis = torch.eye(self.target.width)  # until principal components are measured
                self._add(f"{layer}.mlp.out", layer, Bank(basis, basis.clone(), torch.zeros(len(basis))))
                continue
            for point in self.target.maps(layer):
                self._add(point, layer, Bank.of_map(self.target.weight(point), self.target.bias(point)))

    def _add(self, point: Point, layer: int, bank: Bank) -> None:
        self.sites.append(Site(point, layer, (point,), (Slot(point, point),), len(bank.reader)))
        self.banks[point.replace(".", "_")] = bank

    def bank(self, point: Point) -> Bank:
        """The components that read and write at a point."""
        return self.banks[point.replace(".", "_")]  # type: ignore[return-value]

    @classmethod
    def skip(cls, target: TargetModel, layers: tuple[int, ...]) -> str | None:
        missing = [layer for layer in layers if not target.maps(layer)]
        return f"{target.uri} has no MLP of linear maps at layer {missing[0]}" if missing else None

    @torch.no_grad()
    def finish(self, data: Iterator[Batch]) -> None:
        """Compute principal components, where the method is the autoencoding one."""
        if self.kind == "replacement":
            return
        rows: dict[Point, list[Tensor]] = {site.name: [] for site in self.sites}
        count = 0
        while count < self.config.calibration:
            batch = next(data)
            for point, parts in rows.items():
                parts.append(batch.clean[point].reshape(-1, batch.clean[point].shape[-1]))
            count += len(parts[-1])
        for point, parts in rows.items():
            self.bank(point).take_principal(torch.cat(parts))

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        codes: Codes = {}
        for site in self.sites:
            if site.name not in inputs or (gates is not None and site.name not in gates):
                continue
            bank = self.bank(site.name)
            strength = (inputs[site.name] - bank.centre) @ bank.reader.T
            if gates is not None:
                gate = gates[site.name].gate
            else:
                gate = top_of_rows(strength.abs(), self.choice.k or self.config.k).to(strength.dtype)
            codes[site.name] = SiteCodes(strength, gate)
        return codes

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        bank = self.bank(write)
        return codes[write].value @ bank.writer + bank.bias

    def component_sizes(self, site: Site) -> int:
        bank = self.bank(site.name)
        return bank.reader.shape[1] + bank.writer.shape[1]

    def constant_size(self, write: Point) -> int:
        bank = self.bank(write)
        return len(bank.bias) if bank.has_bias else 0

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Readers and writers."""
        return self.bank(site.name).reader, self.bank(site.name).writer

    @property
    def variant(self) -> str:
        return f"k={self.config.k}"

    @property
    def family(self) -> str:
        return self.name if self.kind == "replacement" else f"{self.name} (sees y)"

    def sweep(self) -> list[Choice]:
        return geometric(max(site.n for site in self.sites))
