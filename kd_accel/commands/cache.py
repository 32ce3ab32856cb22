"""`kd-accel cache build`, `verify` and `info`: creation, check and description of a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd_accel.builders.cache import cache_directory, configs_with_cache
from kd_accel.builders.cache_build import VerifiedCache, build_cache_of, verify_cache_of
from kd_accel.builders.ensemble import errors_of_teacher, teachers_at_hand
from kd_accel.builders.labels import unlabeled_class_names
from kd_accel.cache.info import cache_info, info_text
from kd_accel.cache.manifest import read_spec
from kd_accel.config.ensemble_rules import of_teacher
from kd_accel.config.schema import RunConfig
from kd_accel.distributed import Accelerator, leave_processes, peers_needed, start_processes
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.models.inference import choose_kernels


def run_cache_build(config: RunConfig) -> None:
    """Write the files that the caches of a config lack: all, those of further views or layers, or damaged files."""
    configs, accelerator = configs_with_cache(config), _start(config)
    with peers_needed(accelerator, lambda: "during the build of a cache"):
        for name, own in teachers_at_hand(configs).items():
            with errors_of_teacher(name):
                build_cache_of(own, accelerator, class_names=unlabeled_class_names(config))
    leave_processes(accelerator)


def run_cache_verify(config: RunConfig, *, as_json: bool) -> None:
    """Check every byte of the caches of a config, and recompute a few samples with the teacher.

    Args:
        config: Config of a distillation with a cache.
        as_json: Whether the result is printed as JSON: one object for each cache, by teacher if there are several teachers.

    Raises:
        UserError: If a file is damaged, or the cache does not fit the config.
    """
    configs, accelerator = configs_with_cache(config), _start(config)
    results: dict[str, VerifiedCache] = {}
    with peers_needed(accelerator, lambda: "during the check of a cache"):
        for name, own in configs.items():
            with errors_of_teacher(name):
                results[name] = verify_cache_of(own, accelerator, class_names=unlabeled_class_names(config))
    reports = {name: _verify_report(result) for name, result in results.items()}
    accelerator.print(_json(reports) if as_json else "\n".join(map(_verify_text, results.values())))
    leave_processes(accelerator)
    if wrong := {name: result for name, result in results.items() if result.wrong}:
        settings = (of_teacher("teacher.cache.dir:", name) for name in wrong)
        files = (f"{len(result.wrong)} files of {result.directory}" for result in wrong.values())
        raise UserError(
            f"{', '.join(settings)} {' and '.join(files)} are damaged; run `kd-accel cache build` with the same config, which "
            "rewrites only these files"
        )


def run_cache_info(config: RunConfig, *, as_json: bool) -> None:
    """Print the contents of the caches of a config. Only the files of the caches are read."""
    directories = {name: cache_directory(own) for name, own in configs_with_cache(config).items()}
    infos = {name: cache_info(directory) for name, directory in directories.items()}
    if as_json:
        print(_json(infos, indent=2))
    else:
        print("\n\n".join(info_text(info, read_spec(directories[name])) for name, info in infos.items()))


def _json(by_teacher: Mapping[str, dict[str, Any]], *, indent: int | None = None) -> str:
    """Return the object of a single teacher (name ""), or those of several by name."""
    return json.dumps(by_teacher.get("", by_teacher), indent=indent)


def _start(config: RunConfig) -> Accelerator:
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
