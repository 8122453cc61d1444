"""An SAE that sae-lens trained and saved is scored by the harness as by sae-lens' own evaluation of its own forward."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.data.statistics import output_statistics
from decomp_bench.interop import saelens
from decomp_bench.interop._plain import as_decomposer
from tests.test_parity import BOS, NEWLINE, TOLERANCE, bridged, sae_lens_scores, scores

__all__ = ["bridged"]  # a fixture, asked for by its name
LAYER, HOOK = 1, "blocks.1.hook_mlp_out"
ARCHITECTURES = {"standard": {"l1_coefficient": 0.3}, "topk": {"k": 6}, "batchtopk": {"k": 6}, "jumprelu": {"l0_coefficient": 0.5}}


def train_there(architecture: str, rows: torch.Tensor, folder) -> None:
    """A short training by sae-lens on these activations, saved as it saves for inference."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    kind, config_kind = get_sae_training_class(architecture)
    batches = (rows[start : start + 256] for _ in range(200) for start in range(0, len(rows) - 256, 256))
    config = SAETrainerConfig(total_training_samples=256 * 150, train_batch_size_samples=256, lr=3e-3, lr_end=3e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = kind(config_kind(d_in=rows.shape[1], d_sae=40, **ARCHITECTURES[architecture]))
        sae.cfg.metadata = SAEMetadata(hook_name=HOOK)
        SAETrainer(config, sae, batches).fit()
    sae.save_inference_model(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_of_sae_lens_scores_as_there(bridged, architecture, tmp_path, monkeypatch):
    """The definitions meet as in the test of our own SAEs: the same excluded positions, and variance about our mean."""
    from sae_lens import SAE

    target, source, tokens, bridge = bridged
    tokens = tokens[: len(tokens) // 2 * 2]
    monkeypatch.setattr(source, "evaluation_rows", lambda _split, _tokens: len(tokens))
    y = bridge.run_with_cache(tokens, prepend_bos=False)[1][f"blocks.{LAYER}.mlp.hook_out"][:, 1:].detach().flatten(0, 1)
    train_there(architecture, y, tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    theirs.cfg.metadata.hook_name = f"blocks.{LAYER}.mlp.hook_out"  # what the bridge calls the same place
    known = sae_lens_scores(theirs, bridge, tokens, [BOS])
    known["kl_div_with_sae"] = sae_lens_scores(theirs, bridge, tokens, [BOS, NEWLINE])["kl_div_with_sae"]
    known["fvu"] = known["mse"] / float((y.double() - output_statistics(source).mean[LAYER]).square().sum(1).mean())
    assert 1 < known["l0"] < 38, "neither empty nor dense"
    assert known["kl_div_with_sae"] > 0.001, "the replacement must matter"
    ours = scores(as_decomposer(saelens.read(str(tmp_path))[0], target), source, sweep=False, batch=7)
    pairs = {"l0_mlp": "l0", "fvu": "fvu", "ce": "ce_loss_with_sae", "ce_clean": "ce_loss_without_sae", "kl": "kl_div_with_sae"}
    for mine, other in pairs.items():
        assert ours["single", "self", mine, "all"] == pytest.approx(known[other], abs=TOLERANCE, rel=0), mine
