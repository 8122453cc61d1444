"""Files of published models and runs, fetched once into the cache: Hugging Face Hub repositories and Weights & Biases runs."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path

from decomp_bench.data.cache import cache_dir
from decomp_bench.errors import UserError

WANDB = re.compile(r"wandb:(?P<entity>[\w.-]+)/(?P<project>[\w.-]+)/(?:runs/)?(?P<run>[\w-]+)")


def hub_folder(name: str, patterns: Sequence[str] = (), what: str = "it") -> Path:
    """Local folder with the files of a Hub repository that match the patterns (all of them where none are given).

    Raises UserError where the Hub cannot be reached or has no such repository; `what` says in the message what a local folder would hold.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns) or None))
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
    found = WANDB.fullmatch(uri)
    if found is None:
        raise UserError(f"'{uri}' is no run: write wandb:ENTITY/PROJECT/RUN, or give a local folder that holds {what}")
    path = f"{found['entity']}/{found['project']}/{found['run']}"
    folder = cache_dir() / "wandb" / path
    patterns = [*patterns, *([newest] if newest else [])]
    if all(list(folder.glob(pattern)) for pattern in patterns):
        return folder
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        mode = os.environ["WANDB_MODE"]
        raise UserError(f"cannot fetch {path} from wandb: WANDB_MODE is {mode}; unset it, or give a local folder that holds {what}")
    try:
        import wandb

        run = wandb.Api(timeout=30).run(path)
        names = [file.name for file in run.files()]
        for pattern in (*optional, *patterns):
            matching = fnmatch.filter(names, pattern)
            for name in sorted(matching, key=_number)[-1:] if pattern == newest else matching:
                run.file(name).download(root=str(folder), exist_ok=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot fetch {path} from wandb ({reason}); without network give a local folder that holds {what}") from None
    missing = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if missing:
        raise UserError(f"the wandb run {path} has no file {', '.join(missing)}; it has {', '.join(sorted(names)[:8]) or 'none'}")
    return folder


def _number(name: str) -> int:
    """The last number in a file's name, such as the step of a checkpoint; 0 where there is none."""
    return int((re.findall(r"\d+", Path(name).stem) or ["0"])[-1])
