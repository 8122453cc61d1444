"""Decomposers whose scores are known beforehand."""

from __future__ import annotations

from typing import ClassVar

import torch

from decomp_bench.config import MethodConfig
from decomp_bench.decomposer import Decomposer, Site, SiteCodes, Slot


class Basis(Decomposer):
    """An autoencoding decomposition into the standard basis, all components on: the identity."""

    name = "basis"
    kind = "autoencoding"
    trainable = False
    keep: ClassVar[float] = 1.0

    def build(self, generator):
        self.sites = [Site(str(m), m, (f"{m}.mlp.out",), (Slot(f"{m}.mlp.out", f"{m}.mlp.out"),), self.target.width) for m in self.layers]

    def encode(self, inputs, gates=None):
        codes = {}
        for site in self.sites:
            if site.slots[0].read in inputs:
                y = inputs[site.slots[0].read]
                codes[site.name] = SiteCodes(y, gates[site.name].gate if gates else torch.full_like(y, self.keep))
        return codes

    def decode(self, codes, write, inputs):
        return codes[write.split(".")[0]].value

    def component_sizes(self, site):
        return 2 * self.target.width

    def directions(self, site, slot):
        return torch.eye(site.n), torch.eye(site.n)


class Mean(Basis):
    """Predicts the training mean, with nothing on."""

    name = "mean"
    keep = 0.0
    statistics = None

    def decode(self, codes, write, inputs):
        return self.statistics.mean[int(write.split(".")[0])].expand_as(inputs[write])


class Zero(Basis):
    """Predicts zero."""

    name = "zero"
    keep = 0.0


def make(kind, target, layers=None):
    return kind(MethodConfig(steps=0), target, layers or tuple(range(target.layers)))
