"""The sections of a run file, as frozen structs with checked values and their defaults.

Layer 0: knows nothing of files, and of what the values are used for.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "AdamW",
    "BatchSection",
    "CheckpointSection",
    "CompressSection",
    "Convnet",
    "DataSection",
    "LogSection",
    "Mlp",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "Section",
    "Sgd",
    "StopSection",
]

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
    text_window: Count = 0  # the input is text: predict each value that follows so many
    patch: tuple[Positive, ...] = ()  # the input is volumes: boxes of this size, labelled by centre
    patch_stride: tuple[Positive, ...] = ()  # between boxes; (): their size
    # stratified-v1: each batch has its share of each class; with replacement: balanced-v1 draws
    # classes alike, weighted-v1 samples by a field of weights
    order: Literal["blockwin-v1", "stratified-v1", "balanced-v1", "weighted-v1"] = "blockwin-v1"
    order_weights: str = ""  # the field for weighted-v1
    flip: bool = False  # images in training: mirror half of them
    shift: Count = 0  # images in training: move them by up to so many pixels
    window: Count = 0  # blocks shuffled together; 0: all
    memory_mib: Positive = 512  # for decoded blocks, per rank
    node_cache_mib: Count = 0  # for blocks decoded once per node, which its ranks share; 0: none
    stage: str = ""  # folder on a disk of every node to copy the data set to first; "": none


class BatchSection(Section, frozen=True, kw_only=True):
    """The global batch: one optimizer step's samples, whatever the number of ranks."""

    size: Positive = 64
    microbatch: Positive = 16  # samples that are never split over ranks; batch norm's group
    # gradient accumulation: a rank computes its part of a step in so many passes, one after the
    # other, each over whole microbatches; gradients are exchanged once (docs/accumulate.md)
    accumulate: Positive = 1


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
    # gradients cross nodes during the backward pass, and parameters during the next forward pass;
    # auto: where there are several nodes (docs/overlap.md)
    overlap: Literal["auto", "on", "off"] = "auto"
    bucket_mib: Count = 0  # of gradients exchanged together; 0: what suits
    # a file that `bench allreduce --fit` wrote: what is chosen suits that network (docs/scale.md)
    network: str = ""
    # of dense sums between nodes: direct, a message to every other node; halving, in lg M rounds;
    # ring; auto: for each bucket what is cheapest by the network's model
    algorithm: Literal["auto", "direct", "halving", "ring"] = "auto"
    # what gradients are rounded to between nodes; sums are float32
    wire: Literal["same", "bfloat16", "float16"] = "same"
    threads: Count = 0  # BLAS threads per rank; 0: the node's cores over its ranks


class CompressSection(Section, frozen=True, kw_only=True):
    """How sums of gradients between nodes are compressed; docs/compression.md."""

    # auto: what is quickest, measured, of dense, topk and oktopk
    method: Literal["off", "auto", "topk", "oktopk", "powersgd", "int8", "sign", "bf16"] = "off"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01  # kept by a node: topk, oktopk
    warmup_steps: Count = 0  # in which the density falls from 1; auto: dense steps
    # of what was not sent; momentum: the optimizer's is gathered before the selection, in its place
    memory: Literal["residual", "momentum"] = "residual"
    values: Literal["float32", "bfloat16", "float16"] = "float32"  # on the way: topk, oktopk
    min_size: Count = 16384  # smaller tensors, and those of one dim, are never compressed
    rank: Positive = 4  # columns of the factors of powersgd


class CheckpointSection(Section, frozen=True, kw_only=True):
    """When a checkpoint is written (always at the end), and how many stay."""

    every_steps: Count = 0  # 0: only by epochs
    every_epochs: Count = 1  # 0: only by steps
    keep: Annotated[int, msgspec.Meta(ge=2)] = 2  # the newest may turn out to be damaged
    local: str = ""  # folder on every node itself, a disk or /dev/shm, for others; "": none
    local_every_steps: Count = 0  # between those; docs/stop-resume.md

    def __post_init__(self) -> None:
        if bool(self.local) != bool(self.local_every_steps):
            raise ValueError(
                "local and local_every_steps belong together: where checkpoints on the nodes lie, "
                "and after how many steps there is one"
            )


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
    # docs/report.md has these. What all ranks do when, as "all" or of the steps "100:110"; "": none
    timeline: str = ""
    timeline_mb: Positive = 64  # of all ranks together; what comes then is left out
    tensorboard: bool = False  # also write event files for TensorBoard, into the run folder


class RunConfig(Section, frozen=True, kw_only=True):
    """All of a run file."""

    data: DataSection
    model: Mlp | Convnet
    run: RunSection = RunSection()
    batch: BatchSection = BatchSection()
    optimizer: Sgd | AdamW = Sgd()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    compress: CompressSection = CompressSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stop: StopSection = StopSection()
    log: LogSection = LogSection()

    def __post_init__(self) -> None:
        whole_step = getattr(self.model, "batch_statistics", "") == "step"
        if whole_step and self.batch.accumulate > 1:
            raise ValueError(
                f'model.batch_statistics is "step" and batch.accumulate is {self.batch.accumulate}:'
                " statistics of a whole step need all of its samples in one pass; set "
                'batch.accumulate = 1, or model.batch_statistics = "microbatch"'
            )
