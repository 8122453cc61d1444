"""What we write, loaded by the tools themselves, each installed in a virtual environment of its own where a package index has it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_bench.interop import FORMATS
from decomp_bench.interop._plain import as_plain
from tests.interop.forward import activations, agree, ours, run, target

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


@pytest.mark.parametrize(
    ("form", "name", "activation"),
    [
        *(("dictionary_learning", "sae", activation) for activation in ("relu", "topk", "batchtopk", "jumprelu")),
        ("sparsify", "sae", "topk"),
        ("sparsify", "transcoder", "topk"),
    ],
)
def test_the_tool_computes_our_codes_and_outputs(form, name, activation, environment, tmp_path):
    python = environment(form)
    on = target()
    decomposer = ours(name, on, activation=activation)
    FORMATS[form].load().write(as_plain(decomposer), tmp_path / "written", ABOUT)
    inputs = activations(on)
    save_file({str(i): inputs[site.reads[0]] for i, site in enumerate(decomposer.sites)}, tmp_path / "inputs.safetensors")
    script = DICTIONARY_LEARNING if form == "dictionary_learning" else SPARSIFY
    arguments = [str(tmp_path / part) for part in ("written", "inputs.safetensors", "found.safetensors")]
    done = subprocess.run([str(python), "-c", script, *arguments], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, (codes, written) = load_file(arguments[2]), run(decomposer, inputs)
    agree([found[f"codes.{i}"] for i in range(3)], codes, 1e-5)
    agree([found[f"output.{i}"] for i in range(3)], written, 1e-5)
