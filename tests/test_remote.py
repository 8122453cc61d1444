"""Published files: fetched once, and one line where that is impossible."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from decomp_bench.errors import UserError
from decomp_bench.remote import hub_folder, hub_reachable, wandb_folder


class FakeRun:
    def __init__(self, names: list[str]) -> None:
        self.names, self.fetched = names, []

    def files(self):
        return [SimpleNamespace(name=name) for name in self.names]

    def file(self, name: str):
        def download(root: str, exist_ok: bool) -> None:
            from pathlib import Path

            self.fetched.append(name)
            path = Path(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)

        return SimpleNamespace(download=download)


@pytest.fixture
def api(monkeypatch, tmp_path):
    import wandb

    run = FakeRun(["final_config.yaml", "model_100.pth", "media/picture.png"])
    asked: list[str] = []
    monkeypatch.setattr(wandb, "Api", lambda timeout: SimpleNamespace(run=lambda path: asked.append(path) or run))
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    return run, asked


@pytest.mark.parametrize("name", ["wandb:goodfire/spd/s-1234abcd", "wandb:goodfire/spd/runs/s-1234abcd"])
def test_the_files_asked_for_are_fetched_once(api, name):
    run, asked = api
    folder = wandb_folder(name, ["final_config.yaml", "model_*.pth"])
    assert sorted(p.name for p in folder.iterdir()) == ["final_config.yaml", "model_100.pth"]
    assert wandb_folder(name, ["final_config.yaml", "model_*.pth"]) == folder
    assert asked == ["goodfire/spd/s-1234abcd"]
    assert run.fetched == ["final_config.yaml", "model_100.pth"]


def test_of_many_checkpoints_the_last_one_is_fetched(api):
    run, _ = api
    run.names = ["model_step_900.pt", "model_step_1000.pt", "model_step_64.pt", "tokenizer.json", "model_config.yaml"]
    wandb_folder("wandb:a/b/c", ["model_config.yaml"], newest="model_step_*.pt", optional=["tokenizer*.json", "nothing.*"])
    assert sorted(run.fetched) == ["model_config.yaml", "model_step_1000.pt", "tokenizer.json"]
    run.names = ["model_config.yaml"]
    with pytest.raises(UserError, match=r"has no file model_step_\*\.pt"):
        wandb_folder("wandb:a/b/d", ["model_config.yaml"], newest="model_step_*.pt")


def test_a_file_that_a_run_lacks_is_named(api):
    with pytest.raises(UserError, match=r"has no file \*\.safetensors; it has final_config\.yaml"):
        wandb_folder("wandb:a/b/c", ["*.safetensors"])


@pytest.mark.parametrize("name", ["wandb:a/b", "a/b/c", "wandb:a/b/c/d"])
def test_a_malformed_name_says_how_to_write_it(name):
    with pytest.raises(UserError, match="wandb:ENTITY/PROJECT/RUN"):
        wandb_folder(name, ["*"])


def test_an_unreachable_hub_is_known_at_once(monkeypatch):
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://no-such-host.invalid")
    assert not hub_reachable()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_reachable()


def test_without_network_one_line_says_what_to_give_instead(monkeypatch):
    with pytest.raises(UserError, match=r"cannot fetch a/b/c from wandb.*local folder that holds weights"):
        wandb_folder("wandb:a/b/c", ["*"], "weights")
    with pytest.raises(UserError, match=r"cannot fetch 'someone/something' from the hub.*local folder that holds cfg\.json"):
        hub_folder("someone/something", ["*.json"], "cfg.json")
