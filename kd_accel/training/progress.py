"""Progress display of a training or of a pass over samples: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Progress of a training in optimizer steps, with the latest metrics. Only the main process prints.

    Args:
        name: Name of the run.
        total_steps: Optimizer steps of the training.
        done_steps: Optimizer steps done before a resume; 0 for a new run.
        is_main: Whether this is the main process.
    """

    def __init__(self, name: str, *, total_steps: int, done_steps: int, is_main: bool) -> None:
        self._is_main = is_main
        self._started_at = time.perf_counter()
        self._start_steps = self._done_steps = done_steps
        self._total_steps = total_steps
        self._name = name
        use_bar = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=done_steps, desc=name, unit="step") if use_bar else None

    def advance(self) -> None:
        """Count one optimizer step."""
        self._done_steps += 1
        if self._bar is not None:
            self._bar.update()

    def note(self, epoch: int, values: dict[str, float]) -> None:
        """Show the training metrics of the current step, which `advance` counts afterwards.

        Args:
            epoch: Epochs completed.
            values: Metrics by name.
        """
        text = _shown(values)
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {epoch + 1}, {text}")
        elif self._is_main:
            print(
                f"{self._name}: step {self._done_steps + 1}/{self._total_steps}, {text}, {self._left()} left",
                flush=True,
            )

    def note_epoch(self, epochs_done: int, values: dict[str, float]) -> None:
        """Show the validation metrics after an epoch.

        Args:
            epochs_done: Epochs completed.
            values: Metrics by name.
        """
        self.say(f"{self._name}: epoch {epochs_done} done, validation: {_shown(values)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _left(self) -> str:
        done = self._done_steps + 1 - self._start_steps
        left_s = (time.perf_counter() - self._started_at) / done * (self._total_steps - self._done_steps - 1)
        return _minutes(left_s)


def print_line(text: str) -> None:
    """Print a line on stdout, above a bar if the terminal shows one."""
    tqdm.write(text)
    sys.stdout.flush()


class SampleProgress:
    """Progress of a pass over samples: number done, rate and time left. Only the main process prints.

    Args:
        name: Name of the pass.
        total_samples: Number of samples.
        is_main: Whether this is the main process.
        every_s: Seconds between two plain lines.
    """

    def __init__(self, name: str, *, total_samples: int, is_main: bool, every_s: float = 5.0) -> None:
        self._name, self._total, self._done, self._is_main = name, total_samples, 0, is_main
        self._started_at = self._printed_at = time.perf_counter()
        self._every_s = every_s
        self._bar = tqdm(total=total_samples, desc=name, unit="sample") if is_main and sys.stderr.isatty() else None

    def advance(self, samples: int) -> None:
        """Count a number of samples."""
        self._done += samples
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(samples)
        elif self._is_main and (now - self._printed_at > self._every_s or self._done == self._total):
            self._printed_at = now
            rate = self._done / (now - self._started_at)
            left_s = (self._total - self._done) / rate
            print(
                f"{self._name}: {self._done}/{self._total} samples, {rate:.0f} samples/s, {_minutes(left_s)} left", flush=True
            )

    def close(self) -> None:
        """Close the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    """Format a duration as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _shown(values: dict[str, float]) -> str:
    """Format the metrics for display: loss, accuracy, agreement and images per second, if given."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    for name in ("accuracy", "agreement"):
        if name in values:
            parts.append(f"{name} {100 * values[name]:.2f} %")
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.0f} images/s")
    return ", ".join(parts)
