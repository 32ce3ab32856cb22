"""`kd-accel cache build`, `verify` and `info`: creation, check and description of a cache."""

from __future__ import annotations

import json
from typing import Any

from kd_accel.builders.cache import cache_directory
from kd_accel.builders.cache_build import VerifiedCache, build_cache_of, verify_cache_of
from kd_accel.cache.info import cache_info, info_text
from kd_accel.cache.manifest import read_spec
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import Accelerator, leave_processes, peers_needed, start_processes
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.models.inference import choose_kernels


def run_cache_build(config: RunConfig) -> None:
    """Write the files that the cache of a config lacks: all, those of further views or layers, or damaged files."""
    accelerator = _start(config)
    with peers_needed(accelerator, lambda: "during the build of a cache"):
        build_cache_of(config, accelerator)
    leave_processes(accelerator)


def run_cache_verify(config: RunConfig, *, as_json: bool) -> None:
    """Check every byte of a cache, and recompute a few samples with the teacher.

    Args:
        config: Config of a distillation with a cache.
        as_json: Whether the result is printed as JSON.

    Raises:
        UserError: If a file is damaged, or the cache does not fit the config.
    """
    accelerator = _start(config)
    result = verify_cache_of(config, accelerator)
    accelerator.print(json.dumps(_verify_report(result)) if as_json else _verify_text(result))
    leave_processes(accelerator)
    if result.wrong:
        raise UserError(
            f"teacher.cache.dir: {len(result.wrong)} files of {result.directory} are damaged; run `kd-accel cache build` with "
            "the same config, which rewrites only these files"
        )


def run_cache_info(config: RunConfig, *, as_json: bool) -> None:
    """Print the contents of a cache. Only the files of the cache are read."""
    directory = cache_directory(config)
    info = cache_info(directory)
    print(json.dumps(info, indent=2) if as_json else info_text(info, read_spec(directory)))


def _start(config: RunConfig) -> Accelerator:
    cache_directory(config)
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    return start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)


def _verify_report(result: VerifiedCache) -> dict[str, Any]:
    return {
        **{"directory": str(result.directory), "fingerprint": result.cache_spec.fingerprint, "is_intact": not result.wrong},
        **{"files": result.cache_spec.num_files(), "bytes": result.cache_spec.total_bytes()},
        "wrong": result.wrong,
        "largest_difference": result.largest_difference,
    }


def _verify_text(result: VerifiedCache) -> str:
    if result.wrong:
        return "\n".join(f"{name}: {reason}" for name, reason in result.wrong.items())
    files, size = result.cache_spec.num_files(), readable_size(result.cache_spec.total_bytes())
    if result.largest_difference is None:
        recomputed = "no sample was recomputed, because the config has no teacher (teacher.run or teacher.arch)"
    else:
        difference = f"{result.largest_difference:.2g}"
        recomputed = f"a few samples recomputed by the teacher differ by at most {difference} of the largest value"
    return f"{result.directory}: {files} files, {size}, every byte matches its checksum; {recomputed}"
