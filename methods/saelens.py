"""Sparse autoencoders trained as sae-lens trains them, in this harness: its loss, initialisation and dead-component window, our data.

For users of that library, whose own recipe is compared on equal terms. One training SAE a layer, on the MLP's output. `encode` and
`decode` are those of the SAE that sae-lens saves for inference, on weights that are not folded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from decomp_bench.decomposer import Batch, Choice, Codes, Decomposer, Inputs, Point, Site, SiteCodes, Slot, layer_of

from ._calibration import StrengthCounts
from ._saelens import BATCH_LIKE, ROW_NORMS, TOPK_LIKE, Layer, SaeLensConfig, training_sae
from ._topk import BatchTopK

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE


class SaeLens(Decomposer):
    """A training SAE of sae-lens for each layer."""

    name = "saelens"
    summary = "sae-lens' own training SAEs (standard, gated, topk, jumprelu, batchtopk, matryoshka_batchtopk)"
    kind = "autoencoding"
    Config = SaeLensConfig
    config: SaeLensConfig  # type: ignore[assignment]
    swept = ("k", "threshold")
    on_demand = ("auxiliary_reconstruction_loss", "pre_act_loss")
    paper = "Bloom, Tigges, Duong, Chanin 2024, SAELens (https://github.com/decoderesearch/SAELens)"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"features": 128, "k": 8, "steps": 60, "batch": 256, "lr": 3e-3, "calibration": 4096},
        "laptop": {"lr": 3e-3, "schedule": "linear"},
        "paper": {"features": 4096, "k": 100, "steps": 120_000, "batch": 4096, "calibration": 131_072, "norm_batches": 1000},
    }

    def build(self, generator: torch.Generator) -> None:
        config = self.config
        self.swept = ("k",) if config.architecture == "topk" or self._recalibrated else ("threshold",)  # type: ignore[misc]
        self.coders = nn.ModuleDict()
        for layer in self.layers:
            out = f"{layer}.mlp.out"
            self.sites.append(Site(str(layer), layer, (out,), (Slot(out, out),), config.features))
            self.coders[str(layer)] = Layer(config, self._made(layer, generator.initial_seed()))
        self._statistics: dict[str, Tensor] = {}

    def _made(self, layer: int, seed: int) -> TrainingSAE:
        about = {"model_name": self.target.uri, "hook_name": f"blocks.{layer}.mlp.hook_out"}
        width = self.target.size(f"{layer}.mlp.out")
        return training_sae(self.config, width, seed * 100_003 + layer, about)  # whatever layers are trained beside it

    @property
    def _recalibrated(self) -> bool:
        return self.config.architecture in BATCH_LIKE and self.config.recalibrate

    def coder(self, site: Site) -> Layer:
        """The SAE of a site, with what belongs to it."""
        return self.coders[site.name]  # type: ignore[return-value]

    # ---- codes

    def encode(self, inputs: Inputs, gates: Codes | None = None) -> Codes:
        codes: Codes = {}
        for site in self.sites:
            read = site.reads[0]
            if read in inputs and (gates is None or site.name in gates):
                pre, open_ = self._pre(self.coder(site), inputs[read])
                gate = gates[site.name].gate if gates is not None else self._gate(self.coder(site), pre, open_)
                codes[site.name] = SiteCodes(pre.relu(), gate)
        return codes

    def _pre(self, coder: Layer, x: Float[Tensor, "*rows d"]) -> tuple[Float[Tensor, "*rows n"], Bool[Tensor, "*rows n"] | None]:
        """Pre-activations in the units that thresholds have, and where a gated SAE's own gate is open."""
        sae: Any = coder.sae
        x = sae.process_sae_in(coder.scaling(x))
        if self.config.architecture == "gated":
            return x @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag, x @ sae.W_enc + sae.b_gate > 0
        pre = x @ sae.W_enc + sae.b_enc
        return pre * sae.W_dec.norm(dim=-1) if self._rescales(sae) else pre, None

    def _rescales(self, sae: Any) -> bool:
        return self.config.architecture in TOPK_LIKE and sae.cfg.rescale_acts_by_decoder_norm

    def _gate(self, coder: Layer, pre: Float[Tensor, "*rows n"], open_: Bool[Tensor, "*rows n"] | None) -> Float[Tensor, "*rows n"]:
        sae: Any = coder.sae
        architecture, choice = self.config.architecture, self.choice
        if architecture in TOPK_LIKE and self.training and choice == Choice():
            return (sae.activation_fn(pre) > 0).to(pre.dtype)
        if coder.selection is not None and (architecture == "topk" or choice.k is not None):
            return coder.selection.gate(pre, choice)
        threshold = sae.topk_threshold if architecture in BATCH_LIKE else sae.threshold if architecture == "jumprelu" else pre.new_zeros(())
        active = pre > threshold.to(pre.dtype).clamp(min=max(choice.threshold or 0.0, 0.0))
        return (active if open_ is None else active & open_).to(pre.dtype)

    def decode(self, codes: Codes, write: Point, inputs: Inputs) -> Float[Tensor, "*rows d"]:
        coder, value = self.coders[str(layer_of(write))], codes[str(layer_of(write))].value
        sae: Any = coder.sae
        if sae.cfg.normalize_activations in ROW_NORMS:
            sae.run_time_activation_norm_fn_in(inputs[write])  # it keeps each row's measures for its decoder
        return coder.scaling.undo(sae.decode(value))  # type: ignore[operator, union-attr]

    # ---- training

    def before_training(self, data: Iterator[Batch]) -> None:
        """Estimate the scaling of activations where the options ask for one."""
        if self.config.options.get("normalize_activations") not in ("expected_average_only_in", "covariance_whitening"):
            return
        batches = [next(data) for _ in range(self.config.norm_batches)]
        for site in self.sites:
            rows = [_rows(batch.clean[site.reads[0]]) for batch in batches]
            self.coder(site).scaling.estimate(iter(rows), rows[0].shape[1], len(rows))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each SAE, so that each is clipped as if trained alone."""
        return [{"params": list(coder.parameters()), "betas": self.config.betas} for coder in self.coders.values()]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms of sae-lens' `training_forward_pass` by their names there, each summed over layers."""
        from sae_lens.saes.sae import TrainStepInput

        step, terms, seen = round(progress * self.config.steps), {}, []
        for site in self.sites:
            coder = self.coder(site)
            x = coder.scaling(_rows(batch.clean[site.reads[0]]))
            dead = coder.idle > self.config.dead_feature_window
            given = TrainStepInput(x, coder.coefficients(step), dead, n_training_steps=step, is_logging_step=False)
            out = coder.sae.training_forward_pass(given)
            for name, term in out.losses.items():
                terms[name] = terms[name] + term if name in terms else term
            with torch.no_grad():
                active = out.feature_acts != 0
                coder.fired |= active.any(0)
                error = out.losses["mse_loss"] / (x - x.mean(0)).square().sum(1).mean()
                seen.append(torch.stack([active.sum() / len(x), dead.float().mean(), error.float()]))
        means = torch.stack(seen).mean(0)
        self._statistics = {"l0": means[0], "dead": means[1], "fvu": means[2]}
        return terms

    def after_step(self, progress: float) -> None:
        """Advance the dead-component counters, once a step whatever the number of micro-batches."""
        for site in self.sites:
            self.coder(site).end_step()

    @torch.no_grad()
    def finish(self, data: Iterator[Batch]) -> None:
        """Set batchtopk thresholds so that k components are active on average on training activations."""
        if not self._recalibrated:
            return
        counts, rows = {site: StrengthCounts() for site in self.sites}, 0
        while rows < self.config.calibration:
            batch = next(data)
            for site, count in counts.items():
                count.add(self._pre(self.coder(site), _rows(batch.clean[site.reads[0]]))[0])
            rows = counts[self.sites[0]].rows
        for site, count in counts.items():
            selection, sae = self.coder(site).selection, self.coder(site).sae
            assert isinstance(selection, BatchTopK)
            selection.calibrate(count)
            sae.topk_threshold.copy_(count.thresholds(torch.tensor([self.config.k], dtype=torch.float64))[0])  # type: ignore[operator]

    def train_state(self) -> dict[str, Tensor]:
        return {f"{site.name}.idle": self.coder(site).idle for site in self.sites}

    def load_train_state(self, state: dict[str, Tensor]) -> None:
        for site in self.sites:
            self.coder(site).idle.copy_(state[f"{site.name}.idle"])

    def step_statistics(self) -> dict[str, Tensor]:
        return self._statistics

    # ---- accounting

    def component_sizes(self, site: Site) -> int:
        return 2 * self.target.size(site.reads[0])

    def constant_size(self, write: Point) -> int:
        return self.target.size(write)

    def constant_coefficients(self, write: Point) -> int:
        return ROW_NORMS.get(self.config.options.get("normalize_activations", "none"), 0)

    def directions(self, site: Site, slot: Slot) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]] | None:
        """Read and write vectors in the target's coordinates; None where each row is normalised by itself."""
        if self.constant_coefficients(slot.write):
            return None
        coder, sae = self.coder(site), cast(Any, self.coder(site).sae)
        lengths = sae.W_dec.norm(dim=1, keepdim=True) if self._rescales(sae) else torch.ones_like(sae.W_dec[:, :1])
        read = sae.W_enc.T * (lengths if self.config.architecture != "gated" else sae.r_mag.exp()[:, None])
        unit, zero = torch.eye(read.shape[1], device=read.device), read.new_zeros(1, read.shape[1])
        linear = coder.scaling(unit) - coder.scaling(zero)
        return read @ linear.T, coder.scaling.undo(sae.W_dec / lengths) - coder.scaling.undo(zero)

    @property
    def variant(self) -> str:
        key = "k" if self.config.architecture in TOPK_LIKE else "l0" if self.config.architecture == "jumprelu" else "l1"
        return f"{key}={getattr(self.config, key):g}"

    @property
    def family(self) -> str:
        return f"sae-lens {self.config.architecture.replace('_', ' ')}"

    def sweep(self) -> list[Choice]:
        selection = self.coder(self.sites[0]).selection
        return selection.choices() if selection is not None and "k" in self.swept else []

    # ---- sae-lens' own format

    @torch.no_grad()
    def inference(self, site: Site) -> TrainingSAE:
        """A copy of a layer's SAE that takes the target's activations as they are: the scaling is folded in, by their own functions."""
        coder, made = self.coder(site), self._made(site.layer, self.seed)
        made.to(self.target.device).load_state_dict(coder.sae.state_dict())
        scaler = coder.scaling.scaler()
        if scaler.scaling_factor is not None:
            made.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            whitening = scaler.whitening
            made.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        return made

    def save_inference(self, folder: Path) -> list[Path]:
        """Write each layer's SAE in a subfolder `layer_N` that sae-lens' `SAE.load_from_disk` reads; whole or not at all."""
        written = []
        for site in self.sites:
            final = folder / f"layer_{site.layer}"
            temporary = final.with_name(f".{final.name}.{os.getpid()}")
            try:
                self.inference(site).cpu().save_inference_model(temporary)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            written.append(final)
        return written


def _rows(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "n d"]:
    return x.reshape(-1, x.shape[-1])
