"""Experiments that are programs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from decomp_bench import experiment, script
from decomp_bench.errors import UserError
from decomp_bench.experiment import Options

CONFIG = {
    "title": "A benchmark",
    "preset": "laptop",
    "script": "bench.py",
    "settings": {"size": 4, "names": ["a"]},
    "presets": {"laptop": {}, "smoke": {"settings": {"size": 1}}},
}
BENCH = "from .helper import line\n\ndef main(settings, folder):\n    (folder / 'out.txt').write_text(line(settings))\n"
HELPER = "def line(settings):\n    return f\"{settings['size']} {settings['names']}\"\n"


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "experiments" / "116_bench"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "bench.py").write_text(BENCH)
    (folder / "helper.py").write_text(HELPER)
    return folder


def test_the_script_gets_the_presets_settings_and_a_folder(made):
    found = experiment.load(str(made))
    assert script.execute(found, Options()) == made.parent.parent / "results" / "116_bench" / "laptop"
    folder = script.execute(found, Options(preset="smoke", set=("names=[b,c]",)))
    assert (folder / "out.txt").read_text() == "1 ['b', 'c']"
    assert folder.name == "smoke"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(preset="paper"), "has no preset 'paper'; it has laptop, smoke"),
        (Options(set=("width=3",)), "no such setting; it has names, size"),
        (Options(set=("size=3,4",)), "one value for each key"),
        (Options(seeds=(1,)), "has no --seeds"),
        (Options(target="pydocs-4l"), "has no --target"),
    ],
)
def test_bad_options_are_one_line(made, options, says):
    with pytest.raises(UserError, match=says):
        script.execute(experiment.load(str(made)), options)


def test_a_missing_script_and_a_script_without_main_are_one_line(made):
    (made / "bench.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"bench\.py has no main"):
        script.execute(experiment.load(str(made)), Options())
    (made / "bench.py").unlink()
    with pytest.raises(UserError, match="correct `script`"):
        script.execute(experiment.load(str(made)), Options())


def test_a_config_has_runs_or_a_script(made):
    (Path(made) / "config.yaml").write_text(yaml.safe_dump({key: value for key, value in CONFIG.items() if key != "script"}))
    with pytest.raises(UserError, match="either runs or a script"):
        experiment.load(str(made))
