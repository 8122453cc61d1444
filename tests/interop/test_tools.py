"""What we write, loaded by the tools themselves, and what they write, read by us.

Each tool is installed in a virtual environment of its own, where a package index has it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_bench.interop import FORMATS
from decomp_bench.interop._plain import as_decomposer, as_plain
from tests.interop.forward import activations, agree, ours, outputs, rows, run, target
from tests.interop.forward import codes as codes_of

ABOUT = {"run": "a-run", "model": "a-model", "made_by": "decomp-bench"}
PACKAGES = {
    "dictionary_learning": ("dictionary-learning==0.1.0",),
    "sparsify": ("eai-sparsify==1.3.3", "natsort", "simple-parsing", "docstring-parser", "schedulefree"),
}

DICTIONARY_LEARNING = """
import sys, types
import torch
from safetensors.torch import load_file, save_file

sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=object)  # only runs models, which this does not
from dictionary_learning.utils import load_dictionary

found = {}
for number, x in enumerate(load_file(sys.argv[2]).values()):
    coder, config = load_dictionary(f"{sys.argv[1]}/trainer_{number}", "cpu")
    with torch.no_grad():
        found[f"codes.{number}"] = coder.encode(x)
        found[f"output.{number}"] = coder(x)
save_file({key: value.contiguous() for key, value in found.items()}, sys.argv[3])
"""
SPARSIFY = """
import sys
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

found, inputs = {}, load_file(sys.argv[2])
for number, (name, coder) in enumerate(SparseCoder.load_many(sys.argv[1], local=True).items()):
    with torch.no_grad():
        values, index, pre = coder.encode(inputs[str(number)])
        found[f"codes.{number}"] = torch.zeros_like(pre).scatter(-1, index, values)
        found[f"output.{number}"] = coder(inputs[str(number)]).sae_out
save_file({key: value.contiguous() for key, value in found.items()}, sys.argv[3])
"""

LEARNT_THERE = """
import sys, types
import torch
from safetensors.torch import load_file, save_file

sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=object)
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

x = load_file(sys.argv[2])["0"]
common = {"activation_dim": x.shape[1], "dict_size": 24, "steps": 30, "layer": 1, "lm_name": "a-model", "device": "cpu", "seed": 0,
          "submodule_name": "model.layers.1.mlp", "warmup_steps": 2, "lr": 1e-2}
some = {"k": 3, "decay_start": 20, "threshold_start_step": 5, "threshold_beta": 0.8}
short = {"sparsity_warmup_steps": 2, "decay_start": 20}
kinds = [(StandardTrainer, short), (StandardTrainerAprilUpdate, short), (GatedSAETrainer, short), (JumpReluTrainer, short),
         (TopKTrainer, some), (BatchTopKTrainer, some), (MatryoshkaBatchTopKTrainer, {**some, "group_fractions": [0.25, 0.75]})]
trainSAE((x for _ in range(31)), [{"trainer": kind, **common, **more} for kind, more in kinds], 30, save_dir=sys.argv[1], device="cpu")
found = {}
for number in range(len(kinds)):
    coder, _ = load_dictionary(f"{sys.argv[1]}/trainer_{number}", "cpu")
    with torch.no_grad():
        found[f"codes.{number}"], found[f"output.{number}"] = coder.encode(x), coder(x)
save_file({key: value.contiguous() for key, value in found.items()}, sys.argv[3])
"""
MADE_THERE = """
import sys
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

found, x = {}, load_file(sys.argv[2])["0"]
torch.manual_seed(0)
kinds = [{}, {"activation": "groupmax"}, {"transcode": True}, {"transcode": True, "skip_connection": True}]
for number, kind in enumerate(kinds):
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=24, k=4, **kind))
    for weight in coder.parameters():
        weight.data.copy_(0.5 * torch.randn_like(weight))
    coder.save_to_disk(f"{sys.argv[1]}/{number}/layers.1.mlp")
    with torch.no_grad():
        values, index, pre = coder.encode(x)
        found[f"codes.{number}"] = torch.zeros(len(x), 24).scatter(-1, index, values)
        found[f"output.{number}"] = coder(x).sae_out
save_file({key: value.contiguous() for key, value in found.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Name of a tool -> a Python that has it, over the packages that are here already."""
    made: dict[str, Path] = {}

    def make(tool: str) -> Path:
        if tool not in made:
            folder = tmp_path_factory.mktemp(tool)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            python = folder / "bin" / "python"
            inner = subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True, capture_output=True, text=True
            )
            here = {sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parent.parent)}
            Path(inner.stdout.strip(), "here.pth").write_text("\n".join(sorted(here)) + "\n")
            install = [str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES[tool]]
            installed = subprocess.run(install, check=False, capture_output=True, text=True)
            if installed.returncode:
                pytest.skip(f"{tool} cannot be installed here: {(installed.stderr.strip().splitlines() or ['no message'])[-1]}")
            made[tool] = python
        return made[tool]

    return make


def run_there(python: Path, script: str, inputs: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Run a script of the tool's own Python on a folder `written` and some inputs; what it found."""
    save_file(inputs, folder / "inputs.safetensors")
    arguments = [str(folder / part) for part in ("written", "inputs.safetensors", "found.safetensors")]
    done = subprocess.run([str(python), "-c", script, *arguments], check=False, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(arguments[2])


@pytest.mark.parametrize(
    ("form", "name", "activation"),
    [
        ("dictionary_learning", "sae", "relu"),
        ("dictionary_learning", "sae", "batchtopk"),
        *(pytest.param("dictionary_learning", "sae", activation, marks=pytest.mark.slow) for activation in ("topk", "jumprelu")),
        ("sparsify", "sae", "topk"),
        pytest.param("sparsify", "transcoder", "topk", marks=pytest.mark.slow),
    ],
)
def test_the_tool_computes_our_codes_and_outputs(form, name, activation, environment, tmp_path):
    python = environment(form)
    on = target()
    decomposer = ours(name, on, activation=activation)
    FORMATS[form].load().write(as_plain(decomposer), tmp_path / "written", ABOUT)
    inputs = activations(on)
    given = {str(i): inputs[site.reads[0]] for i, site in enumerate(decomposer.sites)}
    found = run_there(python, DICTIONARY_LEARNING if form == "dictionary_learning" else SPARSIFY, given, tmp_path)
    codes, written = run(decomposer, inputs)
    agree([found[f"codes.{i}"] for i in range(3)], codes, 1e-5)
    agree([found[f"output.{i}"] for i in range(3)], written, 1e-5)


def test_what_dictionary_learning_trains_is_read_as_it_computes(environment, tmp_path):
    """Every trainer of the tool, its folders written by the tool's own training loop."""
    x = rows()
    found = run_there(environment("dictionary_learning"), LEARNT_THERE, {"0": x}, tmp_path)
    coders, _ = FORMATS["dictionary_learning"].load().read(str(tmp_path / "written"))
    assert [coder.activation for coder in coders] == ["relu", "relu", "gated", "jumprelu", "topk", "batchtopk", "batchtopk"]
    for i, coder in enumerate(coders):
        assert (coder.place.layer, coder.place.end) == (1, "out")
        agree([codes_of(coder, x)], [found[f"codes.{i}"]], 1e-5)
        agree(outputs([coder], [x]), [found[f"output.{i}"]], 1e-5)


def test_what_sparsify_saves_is_read_as_it_computes(environment, tmp_path):
    x = rows()
    found = run_there(environment("sparsify"), MADE_THERE, {"0": x}, tmp_path)
    kinds = [("topk", "out", False), ("groupmax", "out", False), ("topk", "in", False), ("topk", "in", True)]
    for i, (activation, end, skip) in enumerate(kinds):
        (coder,), _ = FORMATS["sparsify"].load().read(str(tmp_path / "written" / str(i)))
        assert (coder.activation, coder.place.end, coder.W_skip is not None) == (activation, end, skip)
        on = target()
        ours_of = as_decomposer([coder], on)
        codes, written = run(ours_of, {"1.mlp.in": x, "1.mlp.out": x})
        agree(codes, [found[f"codes.{i}"]], 1e-5)
        agree(written, [found[f"output.{i}"]], 1e-5)
