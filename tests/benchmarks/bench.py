"""Measure what this project says about speed: `python -m tests.benchmarks.bench [--output FILE] [--only NAME ...]`.

Each measure stands beside its baseline, taken in turns with it in the same run (A B A B A B); shown are the medians.
Stores are temporary ones; only the data is this machine's. Leave the machine alone meanwhile: about 17 minutes.
`python -m tests.benchmarks.readme` then puts what was measured into the README.
"""

import argparse
import json
import os
import struct
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from demo_lib.config import ROOT
from demo_lib.data import RAW, find_data

import torch

from tests.benchmarks.lessons import measure_lessons
from tests.benchmarks.rows import HEADER, cells, machine, new_home, table
from tests.benchmarks.stores import measure_queries, measure_tracking, measure_trial
from tests.benchmarks.studies import measure_pruning, measure_workers
from tests.benchmarks.training import measure_accuracy, measure_batches, measure_epoch, measure_imports

OUTPUT = ROOT / "build" / "bench.json"
PARTS = {
    "imports": measure_imports,
    "batches": measure_batches,
    "epoch": measure_epoch,
    "accuracy": measure_accuracy,
    "tracking": measure_tracking,
    "trial": measure_trial,
    "pruning": measure_pruning,
    "workers": measure_workers,
    "queries": measure_queries,
    "lessons": measure_lessons,
}


def use_own_data(folder: Path) -> None:
    """Take this machine's data into the folder, laid as torchvision wants it, and read it there, whatever the home."""
    data = find_data()
    if data.name != "fashion-mnist":
        sys.exit("The benchmark needs the whole Fashion-MNIST: name its folder in DEMO_DATA_DIR.")
    raw = folder / RAW
    raw.mkdir(parents=True)
    for part, split in {"train": data.train, "t10k": data.test}.items():
        images, labels = split.images.numpy().tobytes(), split.labels.to(torch.uint8).numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, len(split), 28, 28) + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(split)) + labels)
    os.environ["DEMO_DATA_DIR"] = str(folder)


def main() -> None:
    """Measure the parts, print the table and save it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description="Measure speeds.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    options = parser.parse_args()
    report = {"machine": machine(), "seconds": {}, "rows": []}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        use_own_data(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-data-"))))
        stack.enter_context(new_home())
        for part in options.only:
            print(f"{part} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            report["rows"] += [row.to_json() for row in PARTS[part]()]
            report["seconds"][part] = round(time.perf_counter() - started, 1)
            print(f"{part}: {report['seconds'][part]:.0f} s", file=sys.stderr, flush=True)
            options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table([HEADER, *map(cells, report["rows"])], "<<>>><"), "", sep="\n")
    print(*(f"{name}: {value}" for name, value in report["machine"].items()), sep="\n")
    print(
        f"{sum(report['seconds'].values()):.0f} seconds in all: {report['seconds']}",
        f"saved in {options.output}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
