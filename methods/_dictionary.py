"""How SAE, transcoder, CLT and random directions are trained: the loss, dead components, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decomp_bench.decomposer import Batch, Point, Site

from ._activations import Code
from ._calibration import StrengthCounts
from ._coders import Coders
from ._dictionary_config import PAPER, SELECTING
from ._end_to_end import rows_that_count
from ._jumprelu import JumpReLU

Terms = dict[str, Tensor]


class Dictionary(Coders):
    """A sparse coder for each layer, trained to reconstruct what its layer writes."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"features": 128, "k": 8, "steps": 60, "batch": 256, "calibration": 4096},
        "laptop": {},
        "paper": PAPER,
    }
    LOOK_EVERY: ClassVar[int] = 10
    """Steps between looks at the dead-component counters; each look waits for the device."""

    def build(self, generator: torch.Generator) -> None:
        super().build(generator)
        self._losses = 0
        self._restarts: dict[Site, tuple[Tensor, Tensor, Tensor]] = {}
        self._restarted: list[tuple[nn.Parameter, Tensor]] = []
        self._statistics: dict[str, Tensor] = {}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`recon`: squared error over the variance of y, summed over layers; `sparsity`: the activation's penalty; `aux`: revival.

        `nested`: the same error of each shorter prefix (matryoshka); `wide`: of four times as many components (multi_k); `stochastic`:
        with inactive components let through in part; `gate`: of what the gates alone reconstruct (gated).
        """
        config = self.config
        inputs = {site: self.coder(site).normalise(self._rows(batch, site.reads[0])) for site in self.sites}
        codes, *wide = self._codes(inputs, *self._counts(progress))
        constants = self._constants(inputs)
        *partial, totals = self._totals(constants, codes)
        wanted = {write: self.output(write)(self._rows(batch, write)) for write in totals}
        errors = {write: F.mse_loss(total, wanted[write]) for write, total in totals.items()}
        terms = {"recon": torch.stack(list(errors.values())).sum(), **self._no_terms()}
        if partial:
            terms["nested"] = torch.stack([_error(prefix, wanted) for prefix in partial]).sum()
        if config.stochastic:
            terms["stochastic"] = config.stochastic * _error(self._totals(constants, self._let_through(codes, inputs))[-1], wanted)
        if wide:
            terms["wide"] = config.multi_k * _error(self._totals(constants, wide[0])[-1], wanted)
        return self._with_the_rest(terms, codes, inputs, constants, wanted, totals, errors, progress)

    def _with_the_rest(
        self,
        terms: Terms,
        codes: dict[Site, Code],
        inputs: dict[Site, Tensor],
        constants: dict[Point, Tensor],
        wanted: dict[Point, Tensor],
        totals: dict[Point, Tensor],
        errors: dict[Point, Tensor],
        progress: float,
    ) -> Terms:
        """Terms with penalties and revival added; in training, the step is counted and restarts are planned."""
        config = self.config
        self._add_penalties(terms, codes, constants, wanted, progress)
        self._add_revival(terms, inputs, wanted, totals)
        if self.training:
            self._watch(codes, errors)
            if config.revive == "resample" and self._losses % config.resample_every == 0 and progress < config.decay_from:
                self._plan_restarts(inputs, wanted, totals)
        return terms

    def _rows(self, batch: Batch, point: Point) -> Float[Tensor, "rows d"]:
        """A clean activation at the positions that count: all of a batch of rows, the real and replaced ones of sequences."""
        value, index = batch.clean[point], rows_that_count(batch, self.target.keeps_first)
        if index is None:
            return value.reshape(-1, value.shape[-1])
        return value[:, int(self.target.keeps_first) :].flatten(0, 1).index_select(0, index)

    def _counts(self, progress: float) -> tuple[int | None, ...]:
        """Numbers of components to select in a step: the activation's own (None), and four times as many."""
        if self.config.activation not in SELECTING:
            return (None,)
        for site in self.sites:
            activation = self.coder(site).activation
            activation.k = activation.config.k_at(progress)  # type: ignore[assignment]
        k = self.config.k_at(progress)
        return (None, min(4 * k, self.config.features)) if self.config.multi_k else (None,)

    def _let_through(self, codes: dict[Site, Code], inputs: dict[Site, Tensor]) -> dict[Site, Code]:
        """Codes in which inactive components too are active, each with a share of its strength that is drawn for every entry."""
        found = {}
        for site, code in codes.items():
            coder = self.coder(site)
            pre = coder.pre(inputs[site])
            gate = (code.value > 0).to(pre.dtype) if code.support is None else code.support.gate()
            own = torch.Generator(pre.device).manual_seed((self.seed * 1_000_003 + site.layer) * 1_000_003 + self._losses)
            share = gate + (1 - gate) * torch.rand(pre.shape, generator=own, device=pre.device)
            found[site] = replace(code, pre=pre, value=share * coder.activation.strength(pre), support=None)
        return found

    def _codes(self, inputs: dict[Site, Tensor], *counts: int | None) -> list[dict[Site, Code]]:
        """Codes of every site, for each number of active components."""
        found = {site: self.coder(site).codes(x, *counts) for site, x in inputs.items()}
        return [{site: codes[place] for site, codes in found.items()} for place in range(len(counts))]

    def _no_terms(self) -> dict[str, Tensor]:
        """Zeros for the terms that not every step has, so that every step names the same ones."""
        config = self.config
        revives = (config.aux and config.revive == "aux") or (config.pre_act and config.revive == "pre_act")
        names = (["aux"] if revives else []) + (["sparsity"] if config.sparsity else [])
        return {name: self.coder(self.sites[0]).b_enc.new_zeros(()) for name in names}

    def _constants(self, inputs: dict[Site, Tensor]) -> dict[Point, Tensor]:
        """What each place receives whatever is active, in normalised coordinates."""
        constants: dict[Point, Tensor] = {}
        for write in dict.fromkeys(slot.write for site in inputs for slot in site.slots):
            own, site = self._own(write)
            bias = self.output(write).b_dec
            constants[write] = bias if own.W_skip is None else F.linear(inputs[site], own.W_skip, bias)
        return constants

    def _totals(self, constants: dict[Point, Tensor], codes: dict[Site, Code]) -> list[dict[Point, Tensor]]:
        """What each place receives in normalised coordinates: from all components last, before that from each nested prefix."""
        decoders = {site: self.coder(site).decoder() for site in codes}
        if self.config.activation != "matryoshka":
            return [self._written(constants, codes, decoders)]
        bounds, totals = [0, *self.config.widths()], [constants]
        split = {site: decoder.split([stop - start for start, stop in pairwise(bounds)]) for site, decoder in decoders.items()}
        for place, (start, stop) in enumerate(pairwise(bounds)):
            part = {site: code.between(start, stop) for site, code in codes.items()}
            own = {site: split[site][place] if part[site].features == stop - start else decoders[site] for site in codes}
            totals.append(self._written(totals[-1], part, own))
        return totals[1:]

    def _written(self, base: dict[Point, Tensor], codes: dict[Site, Code], decoders: dict[Site, Tensor]) -> dict[Point, Tensor]:
        """What codes add to each place."""
        totals = dict(base)
        for site, code in codes.items():
            widths = [self.target.size(slot.write) for slot in site.slots]
            added = code.decode(decoders[site])
            added = added if self.shards is None else self.shards.sum(added)
            for slot, term in zip(site.slots, added.split(widths, 1), strict=True):
                totals[slot.write] = term + totals[slot.write]
        return totals

    def _add_penalties(
        self, terms: Terms, codes: dict[Site, Code], constants: dict[Point, Tensor], wanted: dict[Point, Tensor], progress: float
    ) -> None:
        config = self.config
        if config.sparsity is None:
            return
        warm = min(1.0, progress / config.penalty_warmup) if config.penalty_warmup else 1.0
        opened: dict[Site, Code] = {}
        for site, code in codes.items():
            coder = self.coder(site)
            penalty = coder.activation.penalty(code, coder.decoder())
            if penalty is not None:
                terms["sparsity"] = terms["sparsity"] + warm * penalty
            if (gates := coder.activation.open(code)) is not None:
                opened[site] = gates
        if opened:
            decoders = {site: self.coder(site).decoder() for site in opened}
            if config.gate_decoder == "frozen":
                decoders = {site: decoder.detach() for site, decoder in decoders.items()}
                constants = {write: constant.detach() for write, constant in constants.items()}
            terms["gate"] = _error(self._written(constants, opened, decoders), wanted)

    def _add_revival(self, terms: Terms, inputs: dict[Site, Tensor], wanted: dict[Point, Tensor], totals: dict[Point, Tensor]) -> None:
        config = self.config
        for site, x in inputs.items():
            coder = self.coder(site)
            if "aux" not in terms or not coder.dead_everywhere:
                continue
            if config.revive == "pre_act":
                assert isinstance(coder.activation, JumpReLU)
                term = coder.activation.below(coder.pre_of(x, coder.dead_ids), coder.dead_ids, coder.decoder())
                terms["aux"] = terms["aux"] + config.pre_act * term
            else:
                residual = torch.cat([(wanted[slot.write] - totals[slot.write]).detach() for slot in site.slots], 1)
                terms["aux"] = terms["aux"] + config.aux * coder.revival(x, residual, config.aux_k or max(1, x.shape[1] // 2))

    @torch.no_grad()
    def _plan_restarts(self, inputs: dict[Site, Tensor], wanted: dict[Point, Tensor], totals: dict[Point, Tensor]) -> None:
        """For each dead component a row to start again from, drawn by the square of its error (Bricken et al. 2023)."""
        for site, x in inputs.items():
            coder = self.coder(site)
            coder.find_dead(self.config.dead_after)
            if not len(coder.dead_ids):
                continue
            y = torch.cat([wanted[slot.write] for slot in site.slots], 1)
            error = torch.cat([wanted[slot.write] - totals[slot.write] for slot in site.slots], 1).square().sum(1)
            ids = coder.dead_ids[: len(error)]  # each row once: two components that start alike would stay so
            own = torch.Generator().manual_seed((self.seed * 1_000_003 + site.layer) * 1_000_003 + self._losses)
            rows = error.square().cpu().clamp(min=1e-30).multinomial(len(ids), generator=own).to(x.device)
            self._restarts[site] = (ids, x[rows], y[rows])

    def _watch(self, codes: dict[Site, Code], errors: dict[Point, Tensor]) -> None:
        together = torch.cat([code.value.detach() for code in codes.values()]) if self.across_layers else None
        l0 = [self.coder(site).watch(code, code.value if together is None else together) for site, code in codes.items()]
        self._losses += 1
        if self._losses % self.LOOK_EVERY == 0:
            for site in codes:
                self.coder(site).find_dead(self.config.dead_after)
        with torch.no_grad():
            dead = torch.stack([self.coder(site).dead.float().mean() for site in codes])
            fvu = torch.stack(list(errors.values())).mean()
            self._statistics = {"l0": torch.stack(l0).mean(), "dead": dead.mean(), "fvu": fvu}

    def step_statistics(self) -> dict[str, Tensor]:
        return self._statistics

    # ---- training

    def before_training(self, data: Iterator[Batch]) -> None:
        """Measure the normalisation of every point that is read or written."""
        rows = self._take(data)
        for site in self.sites:
            self.coder(site).normalise.measure(rows[site.reads[0]])
            for slot in site.slots:
                self.output(slot.write).measure(rows[slot.write])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each coder and each output bias, so that clipping does not couple layers."""
        groups = [[p for p in module.parameters() if p.requires_grad] for module in (*self.coders.values(), *self.outputs.values())]
        return [{"params": params, "betas": self.config.betas} for params in groups if params]

    def after_step(self, progress: float) -> None:
        """Start planned components again, and bring decoder rows back to unit length."""
        for site, (ids, x, y) in self._restarts.items():
            self._restarted += [(parameter, ids) for parameter in self.coder(site).restart(ids, x, y)]
        self._restarts = {}
        if self.config.decoder_rows == "unit":
            for site in self.sites:
                self.coder(site).to_unit_rows()

    def restarted(self) -> list[tuple[nn.Parameter, Tensor]]:
        found, self._restarted = self._restarted, []
        return found

    @torch.no_grad()
    def finish(self, data: Iterator[Batch]) -> None:
        """Calibrate thresholds on training activations."""
        if self.config.activation not in ("batchtopk", "matryoshka"):
            return
        inputs = self._calibration_inputs(data)
        counts = {site: StrengthCounts() for site in self.sites}
        if self.across_layers:
            counts = dict.fromkeys(self.sites, StrengthCounts())
        for site in self.sites:
            for part in inputs[site].split(4096):
                counts[site].add(self.coder(site).pre(part))
        for site in self.sites:
            self.coder(site).activation.calibrate(counts[site])  # type: ignore[operator]

    def _calibration_inputs(self, data: Iterator[Batch]) -> dict[Site, Float[Tensor, "rows d"]]:
        """What each coder reads in training, normalised."""
        rows = self._take(data)
        return {site: self.coder(site).normalise(rows[site.reads[0]]) for site in self.sites}

    def _take(self, data: Iterator[Batch]) -> dict[Point, Float[Tensor, "rows d"]]:
        """Activation rows at every point for measuring and calibrating."""
        taken: dict[Point, list[Tensor]] = {point: [] for point in sorted(self.points())}
        count = 0
        while count < self.config.calibration:
            batch = next(data)
            for point, parts in taken.items():
                parts.append(self._rows(batch, point))
            count += len(parts[-1])
        return {point: torch.cat(parts) for point, parts in taken.items()}

    def train_state(self) -> dict[str, Tensor]:
        state = {"losses": torch.tensor(self._losses)}
        for site in self.sites:
            coder = self.coder(site)
            state |= {f"{site.name}.idle": coder.idle, f"{site.name}.dead": coder.dead}
        return state

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        self._losses = int(state["losses"])
        for site in self.sites:
            coder = self.coder(site)
            coder.idle.copy_(state[f"{site.name}.idle"])
            coder.dead.copy_(state[f"{site.name}.dead"])
            coder.forget_dead_ids()


def _error(totals: dict[Point, Tensor], wanted: dict[Point, Tensor]) -> Float[Tensor, ""]:
    """Squared error over the variance of y, summed over layers."""
    return torch.stack([F.mse_loss(total, wanted[write]) for write, total in totals.items()]).sum()
