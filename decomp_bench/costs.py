"""What runs take, and how many processes share them: for plans and estimates, before anything is executed. Imports no torch."""

from __future__ import annotations

from typing import Any

from decomp_bench.config import RunConfig, TrainConfig, parse


def estimate(config: RunConfig) -> float:
    """Seconds that a run takes on one core, roughly: what it trains on and is scored on, at rates measured on the embedded target."""
    from decomp_bench.registry import method

    kind = method(config.method)
    own = parse(kind.Config, config.method_config, config.method)
    scored = min(config.eval.tokens, 250_000) / 9000  # seconds of one pass
    if not kind.trainable or own.steps == 0:
        return 10.0 + 40 * scored  # its whole curve is an inference-time sweep
    rows, passes = own.steps * own.batch, len(config.eval.protocols) * len(config.eval.gates) + 5 * config.eval.sweep
    if config.target.startswith("toy:"):  # one of several seeds that are trained together
        return 10.0 + rows / 100_000
    if kind.trained_on(own) == "sequences":
        return 10.0 + rows * (config.data.context or 256) / 1650 + 2.5 * passes * scored
    return 10.0 + rows / 20_000 + passes * scored


def apart(config: RunConfig) -> list[Any]:
    """What runs have to share to be executed together."""
    from decomp_bench.registry import method

    kind = method(config.method)
    own = parse(kind.Config, config.method_config, config.method)
    return [kind.trained_on(own) if kind.trainable else "none", config.target, config.data.model_dump(), config.train.model_dump()]


def default_workers(config: TrainConfig) -> int:
    """As many as the cores carry; one where a GPU does the work, which a list of runs shares better than processes do."""
    from decomp_bench.provenance import cores, has_nvidia

    if config.device.startswith("cuda") or (config.device == "auto" and has_nvidia()):
        return 1
    return max(1, cores() // config.threads)
