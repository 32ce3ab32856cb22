"""Run configuration as frozen pydantic models: each setting is declared, typed and described once.

The "Args:" of a class is the `--help` of its settings. Rules that need more than a type are in validation.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kd_accel.config.data_schema import MAX_IMAGE_SIZE as MAX_IMAGE_SIZE
from kd_accel.config.data_schema import DataConfig as DataConfig
from kd_accel.config.distill_schema import DistillConfig as DistillConfig
from kd_accel.config.distill_schema import EnsembleConfig as EnsembleConfig
from kd_accel.config.distill_schema import FeatureLossConfig as FeatureLossConfig
from kd_accel.config.distill_schema import LogitLossConfig as LogitLossConfig
from kd_accel.config.distill_schema import Schedule as Schedule
from kd_accel.config.run_name import AUTO, run_name
from kd_accel.config.section import Argument as Argument
from kd_accel.config.section import Section as Section
from kd_accel.config.teacher_schema import CacheConfig as CacheConfig
from kd_accel.config.teacher_schema import MemberConfig as MemberConfig
from kd_accel.config.teacher_schema import Stem as Stem
from kd_accel.config.teacher_schema import StorageType as StorageType
from kd_accel.config.teacher_schema import TeacherConfig as TeacherConfig

Precision = Literal["float32", "bf16", "fp16"]


class ModelConfig(Section):
    """The trained model.

    Args:
        arch: Architecture: torchvision/NAME, timm/NAME or import:package.module:function.
        stem: First layers of a ResNet: imagenet (7x7 stride 2, max-pool), no_pool (without the max-pool), cifar (3x3 stride 1).
        weights: Run directory, .safetensors file, or the library's name of pretrained weights (downloaded); null = random. The
            mean and std of a run or library are used, unless data.mean and data.std are set.
        arch_args: Further arguments of the library's builder, such as {zero_init_residual: true}.
        freeze: Names of modules that keep their weights and stay in evaluation mode, such as [conv1, bn1, layer1].
    """

    arch: str = "torchvision/resnet18"
    stem: Stem = "imagenet"
    weights: str | None = None
    arch_args: dict[str, Argument] = Field(default_factory=dict)
    freeze: list[str] = Field(default_factory=list)


class OptimConfig(Section):
    """The optimizer and its learning rate.

    Args:
        name: Algorithm.
        lr: Peak learning rate.
        momentum: Momentum (sgd).
        nesterov: Nesterov momentum (sgd).
        betas: Decay rates of the moment estimates (adamw).
        weight_decay: Weight decay of all trained parameters, or of some (norm_bias_weight_decay).
        norm_bias_weight_decay: Whether norms and biases (parameters of one dimension) have weight decay, too.
        schedule: Learning rate over the steps of the run.
        warmup_fraction: Fraction of the steps in which the rate rises to its peak; null = 0.3 for onecycle, else 0.
        step_epochs: Epochs after which the rate is multiplied by step_gamma (step).
        step_gamma: Factor at these epochs (step).
        clip_norm: Largest norm of the gradient of all parameters together; null = no clipping.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 5.0e-4
    norm_bias_weight_decay: bool = True
    schedule: Literal["onecycle", "cosine", "step", "constant"] = "onecycle"
    warmup_fraction: float | None = None
    step_epochs: list[int] = Field(default_factory=list)
    step_gamma: float = 0.1
    clip_norm: float | None = None


class TrainConfig(Section):
    """The training loop.

    Args:
        epochs: Number of passes over the training samples.
        max_steps: Number of optimizer steps after which the training and its schedules end; null = all epochs.
        batch_size: Samples of one optimizer step, over all processes and accumulation steps.
        grad_accum_steps: Forward passes per process in one optimizer step.
        precision: Numeric precision: float32, or bf16 or fp16 (autocast).
        compile: Compile student and teacher with torch.compile.
        cuda_graph: Record a step and replay it with one launch; auto = on one GPU, in one process, without compile.
        channels_last: Memory format channels_last of images, feature maps and, on GPUs, weights; null = on GPUs.
        cpu_kernels: This package's CPU kernels in place of PyTorch's; auto = on CPUs.
        label_smoothing: Label smoothing of the cross-entropy.
        class_weights: Factor of the cross-entropy for each class: balanced = inverse to its training samples, with a mean of 1
            over these; a list in the order of the classes; {class name: factor}, the others 1; null = 1.
        ema_decay: Decay per step of an exponential moving average of the weights, which is evaluated and saved; null = none.
            After t steps the decay is at most 1 - (1 + t) ** (-2/3), as in timm.
        eval_batch_size: Samples per process in one forward of an evaluation.
        eval_every_epochs: Epochs between evaluations on the validation samples.
        early_stopping_epochs: Epochs without a better validation accuracy after which the training ends; schedules are those of
            all epochs; null = never.
        log_every_steps: Steps between lines of metrics.
        deterministic: Use deterministic GPU kernels only; slower.
        tf32: TF32 in float32 convolutions and matrix products (GPUs); false = full float32.
        timeout_s: Seconds until a silent process counts as lost; more than a download takes; null = 600 (GPUs) or 1800 (CPUs).
        sync_batchnorm: BatchNorm statistics over all processes (GPUs); each layer then synchronizes the device in each forward.
    """

    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 128
    grad_accum_steps: int = 1
    precision: Precision = "float32"
    compile: bool = False
    cuda_graph: Literal["auto", "always", "never"] = "auto"
    channels_last: bool | None = None
    cpu_kernels: Literal["auto", "always", "never"] = "auto"
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | list[float] | dict[str, float] | None = None
    ema_decay: float | None = None
    eval_batch_size: int = 256
    eval_every_epochs: int = 1
    early_stopping_epochs: int | None = None
    log_every_steps: int = 20
    deterministic: bool = False
    tf32: bool = True
    timeout_s: float | None = None
    sync_batchnorm: bool = False


class CheckpointConfig(Section):
    """Checkpoints, and resuming from them.

    Args:
        every_epochs: Epochs between checkpoints; null = only at the end.
        every_steps: Optimizer steps between further checkpoints; null = none.
        keep: Number of latest checkpoints that are kept.
        keep_best: Also keep the weights of the epoch with the best validation accuracy, in model_best.safetensors.
        resume: Policy: auto = resume if a checkpoint exists; never = refuse a run directory in use; must = refuse an empty one.
        stop_after_steps: Step after which the training writes a checkpoint and stops, to be resumed later (time-limited jobs).
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    keep: int = 2
    keep_best: bool = False
    resume: Literal["auto", "never", "must"] = "auto"
    stop_after_steps: int | None = None


class TrackingConfig(Section):
    """Weights & Biases and TensorBoard, in addition to metrics.jsonl, which is always written.

    Args:
        wandb: Mode of W&B: auto = online with an API key, else offline, and disabled where wandb is not installed.
        project: W&B project; WANDB_PROJECT, if it is set, replaces the default.
        entity: W&B team or user; null = WANDB_ENTITY, else the account's default.
        group: W&B group; null = WANDB_RUN_GROUP, if it is set.
        tags: W&B tags; an empty list = WANDB_TAGS, if it is set.
        dir: Directory in which W&B makes `wandb/`, and TensorBoard `tensorboard/RUN`; that of several runs shows them side by
            side. null = WANDB_DIR for W&B, else the run directory.
        log_model: Whether model.safetensors and model.json are logged to W&B as an artifact.
        tensorboard: Whether event files for TensorBoard are written.
        timeout_s: Seconds until a run whose W&B service does not respond is tracked offline.
    """

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "kd-accel"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    dir: str | None = None
    log_model: bool = False
    tensorboard: bool = False
    timeout_s: int = 15


class RunConfig(Section):
    """One training.

    Args:
        name: Name of the run; auto = ARCH-DATA-ROLE, such as resnet18-cifar10-distilled.
        run_dir: Directory of the run; null = runs/NAME, with the name of the run.
        role: Label in tables of a run without a teacher; a run with a teacher is `distilled`.
        seed: Seed of initial weights, sample order and dropout.
        data: Images, splits and views.
        model: The trained model.
        teacher: The teacher; null = plain training, or several teachers.
        teachers: Several teachers by name, in place of teacher.
        distill: The distillation objective; null = its defaults if a teacher is set.
        optim: The optimizer and its learning rate.
        train: The training loop.
        checkpoint: Checkpoints, and resuming from them.
        tracking: Weights & Biases.
        profile: Number of steps to record with torch.profiler: traces for ui.perfetto.dev in profile/ of the run directory, and
            the share of each part of a step in its time; null = none.
    """

    name: str = AUTO
    run_dir: str | None = None
    role: Literal["teacher", "student"] = "student"
    seed: int = 0
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    teacher: TeacherConfig | None = None
    teachers: dict[str, MemberConfig] = Field(default_factory=dict)
    distill: DistillConfig | None = None
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    profile: int | None = None

    @field_validator("teachers", mode="before")
    @classmethod
    def _without_teachers(cls, value: Any) -> Any:
        return {} if value is None else value  # null leaves a section out, here as in teacher

    @model_validator(mode="after")
    def _name_the_run(self) -> Self:
        object.__setattr__(self, "name", run_name(self))  # not self.name = ..., because the model is frozen
        return self

    @property
    def directory(self) -> Path:
        """Directory of the run."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name

    @property
    def shown_role(self) -> str:
        """Role in tables and trackers: teacher, student or distilled."""
        return "distilled" if self.has_teacher else self.role

    @property
    def has_teacher(self) -> bool:
        """True if the run is a distillation, from one teacher or several."""
        return self.teacher is not None or bool(self.teachers)

    def by_teacher(self) -> dict[str, RunConfig]:
        """Return the config of each teacher: that of the run with this teacher alone, and the feature losses on its layers.

        Returns:
            Configs by name of the teacher. The name of a single teacher is the empty string.
        """
        if not self.teachers:
            return {"": self} if self.teacher is not None else {}
        return {name: self._with_teacher_alone(name) for name in self.teachers}

    def _with_teacher_alone(self, name: str) -> RunConfig:
        distill = self.distill
        if distill is not None:
            own = {key: feature for key, feature in distill.features.items() if feature.teacher == name}
            features = {key: feature.model_copy(update={"teacher": None}) for key, feature in own.items()}
            distill = distill.model_copy(update={"features": features, "ensemble": EnsembleConfig()})
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}, "distill": distill})


class BenchConfig(Section):
    """A measurement of models.

    Args:
        batch_sizes: Images per forward. A list such as [1, 32] or 1,32, or one number.
        image_size: Side of the images in pixels; null = the run's own (32 for an architecture).
        num_classes: Number of classes of an architecture that is not a run.
        device: Device: auto, cpu, cuda or cuda:N.
        precision: Numeric precision: float32, or bf16 or fp16 (autocast).
        channels_last: Memory format channels_last; null = on GPUs, as in a training.
        compile: Compile the model with torch.compile.
        threads: CPU threads; null = torch's default.
        min_iterations: Smallest number of timed forwards per model and batch size.
        min_time_s: Shortest time per model and batch size, in seconds.
        time_limit_s: Time for all latencies together, in seconds, warm-up included; null = no limit. Figures that are measured
            until then are kept.
        tf32: TF32 in float32 convolutions and matrix products (GPUs), as train.tf32.
        cuda_graph: Also time a CUDA graph of each forward (GPUs).
        onnx: Also time each network in ONNX Runtime (CPUs), as exported by `kd-accel export`.
    """

    batch_sizes: list[int] = Field(default_factory=lambda: [1, 32])
    image_size: int | None = None
    num_classes: int = 10
    device: str = "auto"
    precision: Precision = "float32"
    channels_last: bool | None = None
    compile: bool = False
    threads: int | None = None
    min_iterations: int = 200
    min_time_s: float = 1.0
    time_limit_s: float | None = None
    tf32: bool = True
    cuda_graph: bool = False
    onnx: bool = False

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept one number, and the text 1,32, in place of a list."""
        if isinstance(value, str) and re.fullmatch(r"\s*\d{1,18}\s*(,\s*\d{1,18}\s*)*", value):
            return [int(number) for number in value.split(",")]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class ReproduceConfig(Section):
    """A chain of trainings, each in its own launch, then bench and report. Paths are relative to the working directory.

    Args:
        runs: Config files of the trainings, in order.
        num_seeds: Number of seeds of each training, 0, 1, ..., all in one launch; its runs are NAME-seedK. A run whose weights
            or outputs another training uses is trained once, with its own seed. null = each training has one run, with its
            own seed.
        launch: Config file of `accelerate launch`.
        report_dir: Directory of table and pictures.
        bench: Measurement of the trained models.
    """

    runs: list[str]
    num_seeds: int | None = None
    launch: str
    report_dir: str
    bench: BenchConfig = Field(default_factory=BenchConfig)
