"""Record of the fault tests: trials and losses, counted by kind, printed at the end and written to faults.json."""

import contextlib
import json
import os
import random
from pathlib import Path

from tests.support.launching import ROOT


class FaultRecord:
    """Record of a session of tests.

    Attributes:
        seed: Seed of all random instants, KD_FAULTS_SEED.
        kinds: Numbers of trials and losses, by kind of fault.
    """

    def __init__(self):
        self.seed = int(os.environ.get("KD_FAULTS_SEED", "0"))
        self.kinds = {}

    @contextlib.contextmanager
    def trial(self, kind):
        """Count a fault and the proof, inside the `with` block, that nothing was lost by it. An error counts as a loss."""
        count = self.kinds.setdefault(kind, {"tried": 0, "lost": 0})
        count["tried"] += 1
        try:
            yield
        except BaseException:
            count["lost"] += 1
            raise

    def generator(self, *key):
        """Return the generator of the instants of one test, which are the same in each run."""
        return random.Random(f"{self.seed}/{key}")

    @property
    def result(self):
        totals = {name: sum(count[name] for count in self.kinds.values()) for name in ("tried", "lost")}
        return {**totals, "kinds": self.kinds}

    def finish(self):
        """Print and write the record, unless it is empty."""
        if not self.kinds:
            return
        path = Path(os.environ.get("KD_FAULTS_JSON", ROOT / "runs/faults.json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.result, indent=1) + "\n")
        print(f"\n\nfaults (seed {self.seed}), also in {path.name}")
        for kind, count in [*self.kinds.items(), ("in all", self.result)]:
            print(f"  {kind:44} {count['tried']:4} tried  {count['lost']:4} lost")
