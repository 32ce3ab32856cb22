"""Several seeds of one config: the numbers of `--seeds`, and the run of each seed."""

from __future__ import annotations

from kd_accel.config.schema import RunConfig

MAX_SEEDS = 1000
HELP = "Number of seeds (3 = 0,1,2), or a list such as 0,5,7; by default the seed of the config."


def parse_seeds(text: str, mistakes: list[str]) -> list[int]:
    """Return 0, 1, ..., N - 1 for a number N, and the numbers of a list with a comma; after a mistake, which is added, none."""
    numbers = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(number.isdecimal() and int(number) < 2**32 for number in numbers):
        mistakes.append(f"--seeds: {text!r} must be a number of seeds, such as 3 for 0,1,2, or a list, such as 0,5,7 or 5,")
        return []
    seeds = [int(number) for number in numbers] if "," in text else list(range(min(int(text), MAX_SEEDS + 1)))
    if not 0 < len(seeds) <= MAX_SEEDS or len(set(seeds)) < len(seeds):
        mistakes.append(f"--seeds: {text} must be at least one seed and at most {MAX_SEEDS}, each once")
    return seeds


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """Return the config of one of several runs: name and directory end with the seed."""
    end = f"-seed{seed}"
    return config.model_copy(update={"name": f"{config.name}{end}", "run_dir": f"{config.directory}{end}", "seed": seed})
