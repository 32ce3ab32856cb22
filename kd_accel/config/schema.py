"""What a run can be told: each setting declared once, frozen, and checked before torch is loaded.

Types are checked by the parser (parse.py); the rules that need more than a type are `problems(config)`, which lists all
broken ones together. Nothing is ever written back into a config. The comment or docstring beside a field is its `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Augment = Literal["none", "crop", "crop_flip", "resized_crop", "trivial_augment"]
Stem = Literal["imagenet", "no_pool", "cifar"]
Direction = Literal["student_to_teacher", "teacher_to_student", "both"]
Precision = Literal["no", "fp16", "bf16"]
MAX_IMAGE_SIZE = 4096
StorageType = Literal["float32", "float16", "bfloat16", "int8"]
ArchArgument = bool | int | float | str | None | list[bool | int | float | str | None]
"""Not `Any`: the parser would import the class that a mapping with `class_path` names."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are seen.

    Args:
        source: hub:NAME[@revision], parquet:DIR, imagefolder:DIR, digits, or import:package.module:function.
        image_column: column that holds the images (hub, parquet).
        label_column: column that holds the labels (hub, parquet).
        train_split: name of the split to train on.
        test_split: name of the held-out split.
        image_size: side of the square that every image is brought to, in pixels.
        augment: how a view differs from its image.
        crop_padding: crop, crop_flip, trivial_augment: zero border from which a crop is cut, in pixels.
        views: number of different views of each sample, used in turn (view = epoch mod views); null = new ones each epoch.
        view_seed: seed of the views; not the seed of the run, so that runs of any seed see the same views.
        val_fraction: fraction of the training samples kept for validation; a pure function of the number of samples.
        limit_train: use only this many training samples (validation shrinks in proportion).
        limit_test: use only this many test samples.
        mean: per-channel mean in 0..1; null = measured on the training samples.
        std: per-channel standard deviation in 0..1; null = measured on the training samples.
        memory_limit_mib: decoded sets up to this size are held in memory; larger ones are decoded by workers.
        num_workers: worker processes that prepare batches; 0 = in the training process.
    """

    source: str = "digits"
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 32
    augment: Augment = "crop"
    crop_padding: int = 4
    views: int | None = None
    view_seed: int = 0
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_test: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    memory_limit_mib: int = 4096
    num_workers: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The trained model.

    Args:
        arch: torchvision/NAME, timm/NAME or import:package.module:function.
        stem: ResNets only: imagenet (7x7 stride 2, max-pool), no_pool (without the max-pool), cifar (3x3 stride 1).
        weights: null, a run directory, a .safetensors file, or a name that the library knows (downloaded).
        arch_args: further arguments of the library's builder, such as {zero_init_residual: true}.
    """

    arch: str = "torchvision/resnet18"
    stem: Stem = "imagenet"
    weights: str | None = None
    arch_args: dict[str, ArchArgument] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches: a run of this program, or a model with weights of its own.

    Args:
        run: run directory of the teacher; excludes arch, stem, weights, arch_args, mean and std.
        arch: as model.arch.
        stem: as model.stem.
        weights: as model.weights; must fit exactly, the classifier included.
        arch_args: as model.arch_args.
        mean: per-channel mean in 0..1 that the teacher was trained with.
        std: per-channel standard deviation in 0..1 that the teacher was trained with.
        layers: the teacher's layers, in the order of distill.feature.layers; null = the same names.
        signals: live = the teacher answers for each batch as it comes; cached = from the files of `kd-accel cache build`;
            mixed = logits from the files, features live.
        cache_dir: directory of the cache; whatever its path, it is recognized by what it holds.
        dtype: type of the stored values, int8 for features alone (logits are float16 then); null = float16 for a new cache.
        shard_mib: a new cache: size of the largest tensor's files, in MiB.
        cache_batch_size: a new cache: samples in one forward of the teacher; null = train.batch_size / train.grad_accum_steps.
    """

    run: str | None = None
    arch: str | None = None
    stem: Stem = "imagenet"
    weights: str | None = None
    arch_args: dict[str, ArchArgument] = field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None
    layers: list[str] | None = None
    outputs: Literal["live", "cached", "mixed"] = "live"
    cache_dir: str | None = None
    dtype: StorageType | None = None
    shard_mib: float = 64.0
    cache_batch_size: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A number that changes during training, a pure function of the epochs (or steps) done.

    Args:
        start: value at the beginning.
        kind: exponential = max(floor, start * decay ** t); linear and cosine go from start to end; constant = start.
        floor: exponential: the least value.
        decay: exponential: factor per unit.
        end: linear, cosine: value from `length` on.
        length: linear, cosine: number of units from start to end; null = the whole training.
        unit: what t counts: whole epochs done, or optimizer steps done.
    """

    start: float
    kind: Literal["exponential", "linear", "cosine", "constant"] = "exponential"
    floor: float | None = None
    decay: float | None = None
    end: float | None = None
    length: int | None = None
    unit: Literal["epoch", "step"] = "epoch"


@dataclass(frozen=True)
class FeatureConfig:
    """The feature term: mean squared error between feature maps, summed over the layers.

    Args:
        loss: distance between the two sides of a layer.
        weight: factor of the sum (lambda).
        direction: which side is projected: the student's up, the teacher's down, or both towards the student's width.
        layers: named modules of the student whose outputs are compared.
        pca_images: training images on which the PCA is fitted (view 0).
    """

    loss: Literal["mse"] = "mse"
    weight: float | Schedule = 0.1
    direction: Direction = "both"
    layers: list[str] = field(default_factory=lambda: ["layer1", "layer2", "layer3", "layer4"])
    pca_images: int = 2048


@dataclass(frozen=True)
class DistillConfig:
    """How the student learns from the teacher: alpha * response + (1 - alpha) * hard + weight * feature.

    Args:
        temperature: T of the response term.
        alpha: share of the response term against the labels.
        t_squared: multiply the response term by T squared (Hinton's convention).
        response: kl = KL(teacher || student), both softened by T.
        feature: the feature term; null = none.
    """

    temperature: float | Schedule = 4.0
    alpha: float | Schedule = 0.5
    t_squared: bool = True
    response: Literal["kl"] = "kl"
    feature: FeatureConfig | None = None


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Args:
        name: sgd or adamw.
        lr: peak learning rate.
        momentum: sgd only.
        nesterov: sgd only.
        betas: adamw only.
        weight_decay: on all trained parameters.
        schedule: course of the learning rate over the steps of the run.
        warmup_fraction: share of the steps in which the rate rises to its peak; null = 0.3 for onecycle, else 0.
        step_epochs: step schedule: epochs after which the rate is multiplied by step_gamma.
        step_gamma: step schedule: the factor.
        clip_norm: largest norm of the gradient of all parameters together; null = no clipping.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 5.0e-4
    schedule: Literal["onecycle", "cosine", "step", "constant"] = "onecycle"
    warmup_fraction: float | None = None
    step_epochs: list[int] = field(default_factory=list)
    step_gamma: float = 0.1
    clip_norm: float | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        epochs: passes over the training samples.
        max_steps: end after this many optimizer steps (schedules follow); null = all epochs.
        batch_size: samples in one optimizer step, over all processes and accumulation steps.
        grad_accum_steps: forward passes per process in one optimizer step.
        precision: no (float32), fp16 or bf16 (autocast).
        compile: torch.compile for student and teacher.
        channels_last: memory layout of images, feature maps and, on GPUs, weights; null = on GPUs.
        label_smoothing: of the hard term.
        ema_decay: keep an exponential moving average of the weights with this decay per step, evaluate and save it.
        eval_batch_size: samples per process in one forward of an evaluation.
        eval_every_epochs: evaluate on the validation samples after every so many epochs.
        log_every_steps: write a line of metrics after every so many steps.
        deterministic: only deterministic GPU kernels; slower.
        tf32: GPUs round the inputs of float32 convolutions and matrix products to TF32; false = full float32. CPUs have none.
        timeout_s: how long a process waits for the others before it takes one for lost, in seconds; longer than what one does
            alone (a download, a checkpoint). null = 600 with GPUs and 1800 without.
        sync_batchnorm: BatchNorm layers see the samples of all processes (GPUs only), not each process its own. Each layer waits
            for the device in each forward.
    """

    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 128
    grad_accum_steps: int = 1
    precision: Precision = "no"
    compile: bool = False
    channels_last: bool | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    eval_batch_size: int = 256
    eval_every_epochs: int = 1
    log_every_steps: int = 20
    deterministic: bool = False
    tf32: bool = True
    timeout_s: float | None = None
    sync_batchnorm: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a training is saved, and whether a start goes on from it.

    Args:
        every_epochs: checkpoint after every so many epochs; null = only at the end.
        every_steps: checkpoint after every so many optimizer steps as well.
        keep: how many of the latest checkpoints stay.
        resume: auto = go on if there is a checkpoint; never = refuse a run directory in use; must = refuse an empty one.
        stop_after_steps: write a checkpoint after this step and end there, to be resumed later (time-limited jobs).
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    keep: int = 2
    resume: Literal["auto", "never", "must"] = "auto"
    stop_after_steps: int | None = None


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases, beside metrics.jsonl, which is always written.

    Args:
        wandb: auto = online with a key, else offline; only metrics.jsonl where wandb is not installed.
        project: W&B project.
        entity: W&B team or user; null = the account's default.
        group: W&B group.
        timeout_s: seconds to wait for the W&B service before the run is tracked offline.
    """

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "kd-accel"
    entity: str | None = None
    group: str | None = None
    timeout_s: int = 15


@dataclass(frozen=True)
class RunConfig:
    """One training.

    Args:
        name: name of the run; its directory is runs/NAME unless run_dir is given.
        run_dir: directory of the run.
        role: what a run without a teacher is called in tables; a run with one is `distilled`.
        seed: of initial weights, order of samples, dropout.
        teacher: who teaches; null = plain training.
        distill: how the teacher is listened to; null = the defaults, where there is a teacher.
        profile: record so many steps after the first ones with torch.profiler: a trace for ui.perfetto.dev in profile/ of the
            run directory, and the share of each part of a step.
    """

    name: str = "digits-student"
    run_dir: str | None = None
    role: Literal["teacher", "student"] = "student"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig | None = None
    distill: DistillConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: int | None = None

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name


@dataclass(frozen=True)
class BenchConfig:
    """How models are measured.

    Args:
        batch_sizes: images per forward.
        image_size: side of the images in pixels; null = the run's own (32 for an arch).
        num_classes: classes of an arch that is no run.
        device: auto, cpu, cuda or cuda:N.
        precision: no, fp16 or bf16 (autocast).
        channels_last: memory layout; null = on GPUs, as in a training.
        compile: torch.compile.
        threads: CPU threads; null = as torch finds them.
        min_iterations: least number of timed forwards per model and batch size.
        min_time_s: least time per model and batch size, in seconds.
        tf32: as train.tf32: TF32 in float32 convolutions and matrix products; no effect on a CPU.
        cuda_graph: time a CUDA graph of each forward as well (GPUs only). Off by default until docs/gpu.md has a sample of it.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    image_size: int | None = None
    num_classes: int = 10
    device: str = "auto"
    precision: Precision = "no"
    channels_last: bool | None = None
    compile: bool = False
    threads: int | None = None
    min_iterations: int = 200
    min_time_s: float = 1.0
    tf32: bool = True
    cuda_graph: bool = False


@dataclass(frozen=True)
class ReproduceConfig:
    """A chain of trainings, each its own `accelerate launch`, then bench and report. Paths from the working directory.

    Args:
        runs: config files of the trainings, in order.
        launch: accelerate config file of the launches.
        report_dir: where table and pictures go.
        bench: how the trained models are measured.
    """

    runs: list[str]
    launch: str
    report_dir: str
    bench: BenchConfig = field(default_factory=BenchConfig)
