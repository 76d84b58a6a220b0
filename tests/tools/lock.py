"""Renew the pins, and cap MLflow at the minor version that they have: `make lock`. The tests say whether it fits."""

import re
import subprocess
import sys

from demo_lib.config import ROOT

PINS = ROOT / "constraints.txt"
CAPPED = [ROOT / "pyproject.toml", ROOT / "environment.yml"]
COMPILE = "uv pip compile -q --universal --upgrade --no-annotate --no-header --no-emit-index-url --extra dev"


def cap(below: str) -> None:
    for path in CAPPED:
        text = re.sub(r"(mlflow\[auth\]>=[\d.]+,<)[\d.]+", rf"\g<1>{below}", path.read_text("utf-8"))
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    cap("4")
    subprocess.run([sys.executable, "-m", *COMPILE.split(), "pyproject.toml", "-o", str(PINS)], check=True, cwd=ROOT)
    minor = re.search(r"^mlflow==3\.(\d+)", PINS.read_text("utf-8"), re.M)
    cap(f"3.{int(minor[1]) + 1}")
