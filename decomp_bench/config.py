"""Configs of runs and experiments: frozen pydantic models in which an unknown key is an error. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from decomp_bench.errors import UserError

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class MethodConfig(Config):
    """Base of a method's config. The training fields here hold for every trainable method; a method overrides the defaults."""

    younger: ClassVar[tuple[str, ...]] = ()
    """Keys that a method got after its first runs: at their defaults they stay out of a run's id, so that it is what it was."""
    steps: Annotated[int, Field(ge=0)] = 500
    """Optimiser steps; 0 for a method that is not trained."""
    batch: PositiveInt = 1024
    """Rows of one step: activation rows, or sequences for a method that trains on sequences."""
    accumulate: PositiveInt = 1
    """Micro-batches that a batch is split into; the gradient is that of the whole batch."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "quarter_cosine"] = "linear"
    """Shape of the decay: flat until `decay_from` of the run, then down to `lr_end` times the peak. cosine: half a wave; quarter_cosine: a
    quarter, whose last step is taken at the end value."""
    decay_from: Annotated[float, Field(ge=0, le=1)] = 0.7
    lr_end: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient norm at which each parameter group is clipped."""


class DataConfig(Config):
    """What text or toy distribution a run trains on and is scored on."""

    source: str | None = None
    """None: the target's own data. Else a .txt, .jsonl, .json, .parquet or .csv file (also .gz, .zst), a folder or a glob of them;
    or `hf:NAME`, a data set of the Hugging Face hub (`hf:NAME@REVISION` pins it) or a local folder in one of its formats."""
    column: str = "text"
    """Where a record's text is; a known hub data set has its own where this is `text`."""
    context: PositiveInt | None = None
    """Tokens in a row; None: what the target was trained with."""
    seed: int = 0
    """Order of the data. Runs that share it see the same batches whatever their own seed."""
    packing: Literal["none", "packed", "confined"] = "none"
    """none: a row is a piece of one document, beginning-of-text first, padded. packed: documents follow each other, the end-of-text token
    between them, and rows are cut from that without padding; attention goes across documents, as the published SimpleStories and Pile
    models were trained. confined: the same rows, with a document mask: no position sees another document, and places count from the
    start of each."""
    documents: PositiveInt | None = None
    """At most this many documents: the first ones of local text and of each hub split that is read. None: all, 100,000 of a stream."""
    lower: bool | None = None
    """Lower-case the text. None: no, or as a known hub data set wants it."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    split: str = "train"
    """The split of a hub data set that is trained on; validation and test are cut from it by a hash of each document where not given."""
    validation_split: str | None = None
    """A hub data set's own split for validation, such as `validation`."""
    test_split: str | None = None
    """A hub data set's own split for testing, such as `test`."""
    streaming: bool | None = None
    """Read a hub data set without downloading the whole, shuffled by a buffer with the data seed. None: for known data sets, which are
    large."""
    tokenised: bool | None = None
    """The column holds token ids (`input_ids` unless named), which are cut to the row length. None: as known, else text."""
    activations: Literal["bf16", "int8"] = "bf16"
    """How activation rows are kept for training. int8: half the bytes, each row with a scale of its own. Scoring always computes them."""


class EvalConfig(Config):
    """What is measured. Every run of a comparison shares it."""

    split: Literal["validation", "test", "stream"] = "test"
    """stream: text sampled from the embedded target itself, the same on every machine; there the expected CE difference is the KL."""
    tokens: PositiveInt = 1_000_000
    """At most this many scored tokens, from the start of the split's fixed order; whole rows."""
    batch: PositiveInt = 16
    """Sequences in one evaluation batch. No metric depends on it."""
    protocols: tuple[Literal["cascading", "clean", "single"], ...] = ("cascading", "clean", "single")
    gates: tuple[Literal["clean", "self"], ...] = ("clean", "self")
    sweep_protocols: tuple[Literal["cascading", "clean", "single"], ...] = ("cascading",)
    """Protocols of the inference-time sweep of one checkpoint."""
    sweep_gates: tuple[Literal["clean", "self"], ...] = ("clean",)
    sweep: bool = True
    """False: only what was trained is measured. Methods without training are always swept."""
    bootstrap: PositiveInt = 2000
    """Document resamples behind every interval."""


class TrainConfig(Config):
    """How a run is executed. Nothing here changes which function is learned, except `precision`."""

    device: str = "auto"
    """auto: cuda, then mps, then cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast of language models where the device multiplies bf16 natively (CUDA), else fp32. Evaluation is always fp32."""
    threads: PositiveInt = 1
    """CPU threads; recorded, since the last bits of a sum depend on it."""
    log_every: PositiveInt = 20
    save_every: PositiveInt = 200
    """Steps between resume states."""
    wandb: Literal["off", "offline", "online"] = "off"
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the batched step of runs that differ in their seed only, where a method has one. auto: where it is soon won back."""


class RunConfig(Config):
    """Everything that decides a run's result, and how it is executed."""

    method: str
    target: str = "pydocs-4l"
    layers: tuple[int, ...] | Literal["all"] = "all"
    seed: int = 0
    method_config: dict[str, Any] = Field(default_factory=dict)
    """Validated against the method's own Config when the run is resolved."""
    imported: str | None = None
    """Hash of the files of another tool that the weights come from; None for a run that is trained here."""
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    train: TrainConfig = TrainConfig()


def parse(kind: type[AnyConfig], data: Mapping[str, Any], where: str) -> AnyConfig:
    """Validate a mapping; raises UserError with one line that names file or option, key and fix."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or kind.__name__
        if first["type"] == "extra_forbidden":
            known = ", ".join(_keys_at(kind, first["loc"][:-1]))
            raise UserError(f"{where}: unknown key '{key}'; known keys: {known}") from None
        raise UserError(f"{where}: '{key}': {first['msg']}") from None


def _keys_at(kind: type[BaseModel], path: tuple) -> list[str]:
    for part in path:
        field = kind.model_fields.get(str(part))
        inner = (
            []
            if field is None
            else [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
        )
        if not inner:
            break
        kind = inner[0]
    return sorted(kind.model_fields)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML mapping from a file; raises UserError for a missing or broken file."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', None) or 'cannot be parsed'}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping of keys to values")
    return data


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mappings merged key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_set(items: list[str]) -> list[dict[str, Any]]:
    """`--set key=value` items as nested mappings, one for each point of the sweep that comma-separated values span.

    `method.k=8,16` gives two mappings; `method.` addresses the method's config. Values are YAML scalars; a list is written [0,1].
    """
    points: list[dict[str, Any]] = [{}]
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key or not text:
            raise UserError(f"--set takes key=value, such as method.k=16 or method.k=8,16,32; got '{item}'")
        values = [text] if text.startswith(("[", "{", '"', "'")) else text.split(",")
        path = key.strip().split(".")
        if path[0] == "method" and len(path) > 1:
            path[0] = "method_config"
        points = [merge(point, _nest(path, _scalar(value, item))) for point in points for value in values]
    return points


def _scalar(text: str, item: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {item}: '{text}' is not a value") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _nest(path: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def digest(data: Any, length: int = 8) -> str:
    """Short hash of anything that JSON can hold, independent of key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def field_docs(kind: type[BaseModel]) -> dict[str, str]:
    """Each field of a config as 'type, default' for help texts, and 'type, required' where it has none."""

    def name(annotation: Any) -> str:
        if get_origin(annotation) in (Union, types.UnionType):
            return " | ".join(name(part) for part in get_args(annotation))
        if get_origin(annotation) is Literal:
            return " | ".join(str(value) for value in get_args(annotation))
        return getattr(annotation, "__name__", str(annotation))

    about = {key: "required" if field.is_required() else f"default {field.default}" for key, field in kind.model_fields.items()}
    return {key: f"{name(field.annotation)}, {about[key]}" for key, field in kind.model_fields.items()}
