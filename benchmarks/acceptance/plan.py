"""Parts of the acceptance test in their order, with the names of their cases; gpu_acceptance.py explains the order."""

from __future__ import annotations

from benchmarks.acceptance.guard import Part

ITEMS = tuple("abcdefgh")
_VARIANTS = ("plain", "live_hybrid", "cached_hybrid", "cached_hybrid_int8", "clipped", "averaged", "host_loader")
_DETERMINISTIC = ("deterministic", "deterministic_live_hybrid")
_WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Environment of deterministic trainings, set at the start because earlier variants of the same process initialize CUDA."""
_AGREEMENT = (
    "views/none",
    "views/crop",
    "views/crop_flip",
    "views/crop_flip_erasing",
    "views/crop_flip_mixup",
    "views/crop_flip_cutmix",
    *(f"cached-live/{dtype}" for dtype in ("float32", "float16", "bfloat16", "int8")),
)
_GRAPHS = ("plain", "live_hybrid", "accumulated", "adamw", "dropout", "cached_hybrid")
_GRAPHS_FLOAT32 = ("scheduled", "teacher", "waiting", "capturing")
RESUME = ("resume/float32", "resume/bf16", "logits/bf16", "gradient/bf16")
RESUME_FP16 = ("resume/fp16", "logits/fp16", "overflow/fp16")


def planned(*, is_trial: bool) -> list[Part]:
    """Return the parts of the acceptance test; a trial has no fp16, which kd_accel refuses on a CPU."""
    timed = ("float32", "bf16")
    precisions = timed if is_trial else (*timed, "fp16")
    return [
        *(
            Part("a", name, (*_VARIANTS, *_DETERMINISTIC), _build("steps"), in_child=True, env=_WORKSPACE)
            for name in precisions
        ),
        Part("c", "losses", ("float32", "tf32"), _build("losses")),
        Part("c", "", _AGREEMENT, _build("agreement"), in_child=True),
        Part("d", "", ("cache", "losses", "sigterm", "2-to-1"), _build("ranks")),
        Part("d", "", ("nccl",), _build("nccl"), in_child=True),
        Part("e", "", RESUME if is_trial else (*RESUME, *RESUME_FP16), _build("resume")),
        *(
            Part(
                "h",
                name,
                (*_GRAPHS, *(_GRAPHS_FLOAT32 if name == "float32" else ())),
                _build("graphs"),
                in_child=True,
                env=_WORKSPACE,
            )
            for name in (("float32",) if is_trial else precisions)
        ),
        Part("f", "", ("forward", "build", "build-1024", "verify", "rebuild"), _build("cache"), is_timed=True),
        *(
            Part("b", name, ("128", "1024", "kernels"), _build("speed"), in_child=True, is_timed=True, limit_s=120)
            for name in timed
        ),
        Part("g", "", ("plain", "live_hybrid"), _build("compiled"), is_timed=True),
        Part("b", "bf16", ("compiled",), "benchmarks.acceptance.speed:build_compiled", is_timed=True),
    ]


def _build(module: str) -> str:
    return f"benchmarks.acceptance.{module}:build"
