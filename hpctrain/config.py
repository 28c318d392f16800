"""A run file: what to train, as frozen, checked values.

A value comes from, later wins: its default, the run file (TOML), the environment
(HPCTRAIN_<SECTION>_<KEY>), `--set section.key=value`. Unknown keys are errors that name the
nearest known one. `Resolved` keeps each value's origin for `hpctrain config`.

Layer 0: knows nothing of what the values are used for.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import tomli_w

from hpctrain.errors import UsageError, nearest

__all__ = ["Resolved", "RunConfig", "from_text", "resolve"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections of a run file."""


class RunSection(Section, frozen=True, kw_only=True):
    """What is run, where, and from which seed."""

    folder: str = "runs/run"  # the run directory: logs, metrics, checkpoints
    seed: Count = 1
    epochs: Positive = 1
    steps: Count = 0  # stop after this many steps; 0: after `epochs`
    # of activations, weights and gradients; with a 16-bit type statistics, master weights and the
    # optimizer's state are float32 (docs/precision.md)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    matmul_precision: Literal["float32", "tf32", "bf16"] = "float32"  # of products in float32
    device: Literal["auto", "cpu", "cuda", "sim"] = "auto"


class DataSection(Section, frozen=True, kw_only=True):
    """Which data set, which fields of it, and how it is read."""

    path: str  # folder with manifest.json, made by `hpctrain data pack`
    train: str = "train"  # split to train on
    test: str = "test"  # split to evaluate on; "" for none
    input: str = "image"
    label: str = "label"
    weight: str = ""  # field with a loss weight per sample; "": all 1
    normalize: Literal["standard", "none"] = "standard"  # (x - mean) / deviation of the train split
    window: Count = 0  # blocks shuffled together; 0: all
    memory_mib: Positive = 512  # for decoded blocks, per rank


class BatchSection(Section, frozen=True, kw_only=True):
    """The global batch: one optimizer step's samples, whatever the number of ranks."""

    size: Positive = 64
    microbatch: Positive = 16  # samples that are never split over ranks; batch norm's group


class Mlp(Section, frozen=True, kw_only=True, tag="mlp", tag_field="name"):
    """A fully connected network."""

    hidden: tuple[Positive, ...] = (128,)
    activation: Literal["relu", "gelu"] = "relu"
    norm: Literal["none", "batch", "layer"] = "none"
    dropout: Fraction = 0.0


class Convnet(Section, frozen=True, kw_only=True, tag="convnet", tag_field="name"):
    """A residual convolutional network: stages of blocks, each stage halving the image."""

    widths: tuple[Positive, ...] = (32, 64, 128)
    blocks: Positive = 1  # residual blocks per stage
    activation: Literal["relu", "gelu"] = "relu"
    norm: Literal["batch", "none"] = "batch"
    batch_statistics: Literal["microbatch", "step"] = "microbatch"
    dropout: Fraction = 0.0


class Sgd(Section, frozen=True, kw_only=True, tag="sgd", tag_field="name"):
    """Stochastic gradient descent with momentum."""

    lr: Rate = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Rate = 0.0  # decoupled; not on biases and norms
    clip_norm: Rate = 0.0  # largest global norm of the gradient; 0: no limit


class AdamW(Section, frozen=True, kw_only=True, tag="adamw", tag_field="name"):
    """Adam with decoupled weight decay."""

    lr: Rate = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: Rate = 1e-8
    weight_decay: Rate = 0.01
    clip_norm: Rate = 0.0


class ScheduleSection(Section, frozen=True, kw_only=True):
    """The learning rate as a function of the step: warm-up, then a decay to `final` of it."""

    name: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup_steps: Count = 0
    final: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0  # fraction of lr at the end
    milestones: tuple[
        Positive, ...
    ] = ()  # "step": steps at which the rate is multiplied by `factor`
    factor: Rate = 0.1


class ParallelSection(Section, frozen=True, kw_only=True):
    """How gradients are combined."""

    # shared (CPU), ipc (GPU): straight from the memory of the node's ranks; messages: never that;
    # auto: shared or ipc, or messages where it is not possible; allreduce: MPI_Allreduce and an
    # update of everything on every rank
    reduction: Literal["auto", "shared", "ipc", "messages", "allreduce"] = "auto"
    gpu_mpi: Literal["auto", "on", "off"] = "auto"  # is MPI given GPU memory? docs/gpu-mpi.md
    threads: Count = 0  # BLAS threads per rank; 0: the node's cores over its ranks


class CheckpointSection(Section, frozen=True, kw_only=True):
    """When a checkpoint is written (always at the end), and how many stay."""

    every_steps: Count = 0  # 0: only by epochs
    every_epochs: Count = 1  # 0: only by steps
    keep: Annotated[int, msgspec.Meta(ge=2)] = 2  # the newest may turn out to be damaged


class StopSection(Section, frozen=True, kw_only=True):
    """When a run ends before it is finished, with a checkpoint, to be started again."""

    after: str = ""  # this long after its start, as 3h50m or 90s; "": no limit
    margin: str = "auto"  # earlier by this much; auto: twice the longest step and checkpoint
    at_job_end: bool = True  # also before the batch job ends, where its end is told
    hang_after: str = "10m"  # end with 124 when no call of MPI began or ended for so long; 0: never


class LogSection(Section, frozen=True, kw_only=True):
    """What is reported and evaluated, and how often."""

    every_seconds: Rate = 10.0  # between progress lines where there is no terminal
    evaluate_every_epochs: Count = 1  # 0: only at the end


class RunConfig(Section, frozen=True, kw_only=True):
    """All of a run file."""

    data: DataSection
    model: Mlp | Convnet
    run: RunSection = RunSection()
    batch: BatchSection = BatchSection()
    optimizer: Sgd | AdamW = Sgd()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stop: StopSection = StopSection()
    log: LogSection = LogSection()


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value, by dotted key, came from."""

    config: RunConfig
    origins: dict[str, str]

    def items(self) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value, in the order of the sections."""
        for section, values in msgspec.to_builtins(self.config).items():
            for key, value in values.items():
                dotted = f"{section}.{key}"
                yield dotted, value, self.origins.get(dotted, "default")

    def to_toml(self) -> str:
        """A run file with every value written out."""
        return tomli_w.dumps(msgspec.to_builtins(self.config))


def resolve(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> Resolved:
    """Read the run file at `path`, apply environment and overrides ("section.key=value").

    Raises `UsageError` naming key, value, rule and nearest known key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}") from None
    return from_text(text, str(path), overrides, environment)


def from_text(
    text: str,
    name: str = "run file",
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """As `resolve`, from the text of a run file called `name` in messages."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from None
    origins = {f"{s}.{k}": name for s, v in values.items() if isinstance(v, dict) for k in v}
    for dotted, value, origin in [*_environment(environment or {}), *_overrides(overrides)]:
        section, _, key = dotted.partition(".")
        if not isinstance(values.setdefault(section, {}), dict):
            raise UsageError(f"{name}: {section} must be a section, [{section}]")
        values[section][key] = value
        origins[dotted] = origin
    _check_names(values, origins, name)
    try:
        return Resolved(msgspec.convert(values, RunConfig), origins)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {_explain(error)}") from None


SECTIONS = RunConfig.__struct_fields__
SHORT = {"HPCTRAIN_GPU_MPI": ("parallel", "gpu_mpi")}  # variables with a name of their own


def _environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for variable in sorted(environment):
        if variable in SHORT and environment[variable]:
            section, key = SHORT[variable]
            yield f"{section}.{key}", environment[variable].strip().lower(), f"${variable}"
        parts = variable.lower().split("_", 2)
        if len(parts) == 3 and parts[0] == "hpctrain" and parts[1] in SECTIONS:
            yield f"{parts[1]}.{parts[2]}", _value(environment[variable]), f"${variable}"


def _overrides(overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for item in overrides:
        dotted, equals, text = item.partition("=")
        if not equals or dotted.count(".") != 1:
            raise UsageError(
                f"--set {item}: write section.key=value, for example --set optimizer.lr=0.01"
            )
        yield dotted.strip(), _value(text.strip()), "--set"


def _value(text: str) -> Any:
    """A TOML value; text that is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _structs(section: str) -> tuple[type[Section], ...]:
    """The struct types a section may be: several for a tagged union."""
    kind = next(f.type for f in msgspec.structs.fields(RunConfig) if f.name == section)
    return get_args(kind) or (kind,)


def _default_name(section: str) -> Any:
    """The name that a section has when a run file does not give it; None if it must."""
    default = next(f.default for f in msgspec.structs.fields(RunConfig) if f.name == section)
    return None if default is msgspec.NODEFAULT else default.__struct_config__.tag


def _check_names(values: dict[str, Any], origins: dict[str, str], name: str) -> None:
    """Refuse unknown sections, keys and tags, with the nearest known name."""
    for section, content in values.items():
        if section not in SECTIONS:
            raise UsageError(
                f"{name}: there is no section [{section}]{nearest(section, SECTIONS)}; "
                f"there are {', '.join(SECTIONS)}"
            )
        if not isinstance(content, dict):
            raise UsageError(f"{name}: {section} must be a section, [{section}]")
        structs = {s.__struct_config__.tag: s for s in _structs(section)}
        if len(structs) > 1:
            tag = content.setdefault("name", _default_name(section))
            if tag not in structs:
                raise UsageError(
                    f"{name}: {section}.name is {tag!r}{nearest(str(tag), map(str, structs))}; "
                    f"it must be one of {', '.join(map(str, structs))}"
                )
            known = (*structs[tag].__struct_fields__, "name")
        else:
            known = next(iter(structs.values())).__struct_fields__
        for key in content:
            if key not in known:
                origin = origins.get(f"{section}.{key}", name)
                raise UsageError(
                    f"{origin}: there is no key {section}.{key}{nearest(key, known)}; "
                    f"[{section}] has {', '.join(known)}"
                )


def _explain(error: msgspec.ValidationError) -> str:
    """msgspec's message with the key in front: "batch.size: Expected `int` >= 1"."""
    message, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')}: {message}" if path else message
