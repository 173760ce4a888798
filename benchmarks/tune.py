"""A campaign: how much of the machine's time is training, and what a further trial costs in memory.

Twenty-four trials of the paper's N-CNN that differ in rate and dropout, none of which is stopped, on one dataset in
shared memory. Memory is what a trial's process has to itself; what it shares with others is counted once, for all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from statistics import median

from scale import alone
from train import simulate

from raylens.config import Search
from raylens.dataset import Dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3, help="of each trial")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = alone(simulate, folder, arguments.images)
        facts = alone(search, data, str(Path(folder) / "campaign"), arguments.epochs)
    print(
        f"{facts['num_trials']} trials of {facts['shortest']:.0f} to {facts['longest']:.0f} s, {facts['num_slots']} at "
        f"once: {facts['seconds']:,.0f} s, {facts['busy']:.1%} of the slots' time in trials\n"
        f"images {facts['images_MB']:,.0f} MB, once; a trial {facts['trial_MB']:,.0f} MB of its own"
    )
    print(json.dumps(facts))


def search(uri: str, campaign: str, epochs: int) -> dict[str, float]:
    from raylens import campaign as campaigns
    from raylens import tune

    rates = [1e-5, 3e-5, 1e-4, 3e-4]
    values = {"learning_rate": rates, "dropout": [0.0, 0.1, 0.2, 0.25, 0.3, 0.4]}
    space = {"name": "benchmark", "network": "n-cnn", "epochs": [epochs, epochs], "values": values}
    data = Dataset.open(uri)
    with Memory() as memory:
        tuned = tune.tune(Search.parse(space), campaign, data=data, searcher="grid")
    record = campaigns.read(campaign)
    assert record is not None
    return {
        "num_trials": tuned.num_trials,
        "num_slots": tuned.num_slots,
        "seconds": tuned.seconds,
        "shortest": min(trial.seconds for trial in record.trials),
        "longest": max(trial.seconds for trial in record.trials),
        "busy": record.busy,
        "images_MB": 4 * data.num_pixels**2 * data.num_images / 1e6,
        "trial_MB": median(memory.seen),
    }


class Memory:
    """Looks at what each process of a trial has to itself [MB], again and again while the body runs."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(5.0):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if b"Trainable" in (process / "cmdline").read_bytes():
                        lines = (process / "smaps_rollup").read_text().splitlines()
                        own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
                        self.seen.append(own * 1024 / 1e6)
                except OSError:
                    pass  # it has just ended, or is another's


if __name__ == "__main__":
    main()
