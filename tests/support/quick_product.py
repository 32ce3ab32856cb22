"""Fast replacement of `python -m kd_accel`: writes the output and the files that benchmarks/gpu_reference reads.

The environment variable QUICK_PRODUCT is JSON: {"step_s": {run: reported time of a step in seconds}, "fails": [jobs]}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS_PER_EPOCH = 20
BATCH = 4
SLEEP_S = 0.02
"""Actual time of a step of teacher and plain student, which must still run when gpu_reference stops the student."""


def main():
    """Run a command."""
    command, *rest = sys.argv[1:]
    flags = dict(token.removeprefix("--").split("=", 1) for token in rest if token.startswith("--") and "=" in token)
    settings = json.loads(os.environ["QUICK_PRODUCT"])
    name = Path(flags["run_dir"]).name if command == "train" else f"cache-{rest[0]}" if command == "cache" else command
    if name in settings.get("fails", []):
        sys.exit(f"{name} fails on purpose")
    if command == "train":
        train(Path(flags["run_dir"]), flags, settings.get("step_s", {}).get(name, 0.01))
    elif command == "cache":
        print("cache: 10 samples in 1 s (10 samples/s)")
        print(json.dumps({"is_intact": True, "files": 1, "bytes": 1, "largest_difference": 0.0}))
    elif command == "bench":
        runs = [token for token in rest if not token.startswith("--")]
        models = [{"name": run, "latency": [{"batch_size": 1, "median_ms": 1.0}]} for run in runs]
        Path(flags["out"]).write_text(json.dumps({"models": models}))


def train(run_dir, flags, step_s):
    """Write the files of a training, from its last checkpoint. step_s: reported time of a step in seconds."""
    total = min(int(flags["train.epochs"]) * STEPS_PER_EPOCH, int(flags.get("train.max_steps", 10**6)))
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    position = max((int(path.name[-8:]) for path in checkpoints.iterdir()), default=0)

    def stop(number, frame):
        (checkpoints / f"step-{position:08d}").mkdir()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    sleep_s = 0 if "teacher.run" in flags else SLEEP_S
    while position < total:
        time.sleep(sleep_s)
        position += 1
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": position, "split": "train", "images_per_second": BATCH / step_s}) + "\n")
        print(f"{run_dir.name}: step {position}/{total}, loss 1.0", flush=True)
    (run_dir / "summary.json").write_text(json.dumps({"accuracy": 0.5, "agreement": None, "steps": total}))


if __name__ == "__main__":
    main()
