"""Put what `make bench` measured into the README: `python -m tests.benchmarks.readme [FILE]`.

It copies the file, by default `build/bench.json`, to `docs/bench.json`, and writes the README's tables from it. Given
`docs/bench.json` itself, it writes both anew with names and limits that have changed since.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from demo_lib.config import ROOT, lessons, write_file

from tests.benchmarks.bench import OUTPUT
from tests.benchmarks.rows import HEADER, ROWS, Row, cells

README, KEPT = ROOT / "README.md", ROOT / "docs" / "bench.json"
NAMES = {"python": "Python", "mlflow": "MLflow", "optuna": "Optuna", "torch": "PyTorch"}
NAMES |= {"torchvision": "torchvision", "distributed": "Dask"}


def updated(text: str, report: dict) -> str:
    """Return the README's text with the report's figures; what has no place in it is a ValueError."""
    rows = {row["key"]: row for row in report["rows"]}
    stems = [path.stem for path in lessons()]
    for stem in stems:
        cold = round(rows[f"{stem} cold"]["ours"])
        text = _replaced(text, rf"(\| \[{stem}\]\(.*\| )\d+( \|)$", rf"\g<1>{cold}\g<2>")
    own = {f"{stem} {part}" for stem in stems for part in ("cold", "warm", "imports")}
    measured = [cells(row) for key, row in rows.items() if key not in own]
    times = [_times(stem, *(rows[f"{stem} {part}"] for part in ("cold", "warm", "imports"))) for stem in stems]
    header = ["lesson", "in a new store", "again", "its imports", "its imports again", "limits"]
    shown = [_machine(report), _table([HEADER, *measured]), _table([header, *times])]
    for name, part in zip(("machine", "measures", "lessons"), shown, strict=True):
        mark, end = f"<!-- {name} of make bench -->\n", f"<!-- end of {name} -->"
        text = _replaced(text, rf"(?s)({mark}).*({end})", lambda found, part=part: f"{found[1]}{part}\n{found[2]}")
    return text


def _replaced(text: str, pattern: str, by: object) -> str:
    changed, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"the README has {count} places for {pattern}")
    return changed


def _times(stem: str, cold: dict, warm: dict, imports: dict) -> list[str]:
    seconds = [cold["ours"], warm["ours"], imports["baseline"], imports["ours"]]
    missed = [name for name, row in {"new store": cold, "again": warm, "imports": imports}.items() if not row["met"]]
    return [stem, *(f"{each:.1f}" for each in seconds), f"MISSED: {', '.join(missed)}" if missed else "kept"]


def _table(lines: list[list[str]]) -> str:
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(lines[0]), *others])


def _machine(report: dict) -> str:
    facts, minutes = report["machine"], sum(report["seconds"].values()) / 60
    versions = ", ".join(f"{name} {facts[key]}" for key, name in NAMES.items())
    numbers = "with" if facts["bfloat16"] else "without"
    cores = f"{facts['cores'] or facts['hardware_threads']} cores of {facts['cpu']} {numbers} bfloat16"
    what = f"Measured on {cores}, on the device {facts['device']}"
    return f"{what}, with {versions}, in {minutes:.0f} minutes."


def main() -> None:
    """Copy the file and write the README; one of a part of the measures is refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.readme", description="Write README's figures.")
    parser.add_argument("file", nargs="?", type=Path, default=OUTPUT, help="what `make bench` has written")
    report = json.loads(parser.parse_args().file.read_text("utf-8"))
    repeats = {row["key"]: (row["baseline_repeats"], row["our_repeats"]) for row in report["rows"]}
    if repeats.keys() != ROWS.keys():
        sys.exit("The file has other rows than the table now: run `make bench`, without --only.")
    report["rows"] = [Row(key, *repeats[key]).to_json() for key in ROWS]  # with names and limits as they are now
    text = updated(README.read_text("utf-8"), report)
    write_file(KEPT, f"{json.dumps(report, indent=2)}\n".encode())
    write_file(README, text.encode())


if __name__ == "__main__":
    main()
