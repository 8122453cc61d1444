"""Through TransformerLens' bridge: the numbers of hf: on the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decomp_bench import data, targets
from decomp_bench.config import DataConfig, parse
from decomp_bench.data.streams import with_clean
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from decomp_bench.replacement import clean_points
from decomp_bench.targets import NAMED, data_folder
from tests.targets.models import save


def compare(folder, source_file, rows=2):
    """Points, maps, and neurons and SVD under every protocol, on both loaders."""
    both = [targets.load(f"{scheme}:{folder}") for scheme in ("hf", "tl")]
    hf, tl = both
    assert hf.identity == tl.identity
    assert (hf.layers, hf.width, hf.context, hf.about["parameters"]) == (tl.layers, tl.width, tl.context, tl.about["parameters"])
    assert list(hf.map_paths) == list(tl.map_paths)
    for point in hf.map_paths:
        torch.testing.assert_close(hf.weight(point), tl.weight(point), atol=0, rtol=0)
    found = []
    for target in both:
        source = data.source(target, DataConfig(source=str(source_file), context=24))
        outputs = []
        for name in ("neurons", "svd"):
            kind = method(name)
            decomposer = kind(parse(kind.Config, {"k": 3}, name), target, tuple(range(target.layers)), 0).eval()
            batch = with_clean(source, source.batch("train", np.arange(rows)), clean_points(decomposer))
            outputs += [batch.logits, *(batch.clean[point] for point in sorted(batch.clean))]
            for protocol in ("cascading", "clean"):
                outputs += [decomposer.replaced(batch, protocol=protocol, gates="clean").logits]
            outputs.append(decomposer.replaced(batch, layers=(target.layers - 1,), protocol="single").logits)
            assert torch.equal(target(batch.x), batch.logits)
        found.append(outputs)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    return tl


@torch.no_grad()
def test_the_stories_model_is_the_same_through_both():
    folder = NAMED["stories260k"].path()
    if not folder.is_dir():
        pytest.skip(f"no TinyStories model in {data_folder()}: set DECOMP_BENCH_DATA")
    tl = compare(folder, data_folder() / "tinystories.jsonl")
    x = torch.tensor([[1, 5, 9, 20]])
    torch.testing.assert_close(tl.bridge(x, return_type="logits"), tl(x))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "gemma2"])
@torch.no_grad()
def test_fused_and_transposed_matrices_are_the_same_through_both(kind, tmp_path, tiny_arcee):
    compare(save(kind, tmp_path), tiny_arcee / "text.jsonl")


def test_what_cannot_be_bridged_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no MLP module in its blocks; load it as hf:") as error:
        targets.load(f"tl:{save('opt', tmp_path)}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no folder"):
        targets.load("tl:/no/such/folder")
    with pytest.raises(UserError, match="without network give a local folder"):
        targets.load("tl:gpt2-small")
