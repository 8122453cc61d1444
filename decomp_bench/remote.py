"""Files of published models and runs, fetched once into the cache: Hugging Face Hub repositories and Weights & Biases runs."""

from __future__ import annotations

import fnmatch
import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from decomp_bench.data.cache import cache_dir
from decomp_bench.errors import UserError

_PART = r"[\w-][\w.-]*"
WANDB = re.compile(rf"wandb:(?P<entity>{_PART})/(?P<project>{_PART})/(?:runs/)?(?P<run>{_PART})")


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hub answers; asked first because the library tries for half a minute before it gives up.

    False where HF_HUB_OFFLINE forbids to ask. Behind a proxy, which alone can tell, the answer is yes.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname, place.port or 443), timeout).close()
    except OSError:
        return False
    return True


def hub_folder(name: str, patterns: Sequence[str] = (), what: str = "it") -> Path:
    """Local folder with the files of a Hub repository that match the patterns (all of them where none are given).

    Raises UserError where the Hub cannot be reached or has no such repository; `what` says in the message what a local folder would hold.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns) or None, local_files_only=not hub_reachable()))
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"cannot fetch '{name}' from the hub ({reason}); without network give a local folder that holds {what}") from None


def wandb_folder(
    uri: str, patterns: Sequence[str], what: str = "its files", *, newest: str | None = None, optional: Sequence[str] = ()
) -> Path:
    """Local folder with the files of `wandb:entity/project/run` that match the patterns, fetched where they are not yet in the cache.

    Of the patterns, every one must match a file; those of `optional` need not. Of the files that match `newest` (checkpoints of a run),
    only the one with the largest last number in its name is fetched, and there must be one. Raises UserError for a malformed name,
    without network or key, and for missing files.
    """
    found = wandb_name(uri, what)
    path = f"{found['entity']}/{found['project']}/{found['run']}"
    folder = cache_dir() / "wandb" / path
    patterns = [*patterns, *([newest] if newest else [])]
    if all(list(folder.glob(pattern)) for pattern in patterns):
        return folder
    with _asking_wandb(path, what) as run:
        names = [file.name for file in run.files()]
        for pattern in (*optional, *patterns):
            matching = fnmatch.filter(names, pattern)
            for name in sorted(matching, key=_number)[-1:] if pattern == newest else matching:
                run.file(name).download(root=str(folder), exist_ok=True)
    missing = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if missing:
        raise UserError(f"the wandb run {path} has no file {', '.join(missing)}; it has {', '.join(sorted(names)[:8]) or 'none'}")
    return folder


def _number(name: str) -> int:
    """The last number in a file's name, such as the step of a checkpoint; 0 where there is none."""
    return int((re.findall(r"\d+", Path(name).stem) or ["0"])[-1])


def wandb_artifact(uri: str, kind: str, known: Sequence[str], folder: Path, what: str = "its files") -> None:
    """Download into a folder the newest artifact of a type that the run `wandb:entity/project/run` has logged.

    Raises UserError for a malformed name, without network or key, where there is no such artifact, and, before anything is downloaded,
    where it holds a file that matches none of the patterns in `known`.
    """
    found = wandb_name(uri, what)
    path = f"{found['entity']}/{found['project']}/{found['run']}"
    with _asking_wandb(path, what) as run:
        logged = [artifact for artifact in run.logged_artifacts() if artifact.type == kind]
        if logged:
            newest = max(logged, key=lambda artifact: int(artifact.version.lstrip("v")))
            names = sorted(newest.manifest.entries)
            strange = [name for name in names if ".." in name or not any(fnmatch.fnmatch(name, pattern) for pattern in known)]
            if not strange:
                newest.download(root=str(folder))
    if not logged:
        raise UserError(f"the wandb run {path} has no artifact of type {kind}; it must have been logged with --wandb online")
    if strange:
        raise UserError(f"the artifact of the wandb run {path} is none of ours: it holds {', '.join(strange[:4])}")


def wandb_name(uri: str, what: str = "its files") -> re.Match[str]:
    """Entity, project and run of `wandb:entity/project/run`; raises UserError for anything else."""
    found = WANDB.fullmatch(uri)
    if found is None:
        raise UserError(f"'{uri}' is no run: write wandb:ENTITY/PROJECT/RUN, or give a local folder that holds {what}")
    return found


@contextmanager
def _asking_wandb(path: str, what: str) -> Iterator[Any]:
    """The run at a path of the service; whatever fails in the context is a UserError of one line."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        raise UserError(f"cannot fetch {path} from wandb: WANDB_MODE is {mode}; unset it, or give a local folder that holds {what}")
    try:
        import wandb

        yield wandb.Api(timeout=30).run(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot fetch {path} from wandb ({reason}); without network give a local folder that holds {what}") from None
