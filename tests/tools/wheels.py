"""Python packages of one line, for a test's own package index; needs nothing but Python."""

from pathlib import Path
from zipfile import ZipFile


def write_wheel(folder: Path | str, name: str, version: str, *requires: str) -> str:
    """Write a package whose only module tells its version, and return the file's name."""
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: dev"]
    files = {
        f"{name}.py": f"version = {version!r}",
        f"{info}/METADATA": "\n".join([*metadata, *(f"Requires-Dist: {each}" for each in requires)]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any",
        f"{info}/RECORD": "",
    }
    wheel = f"{name}-{version}-py3-none-any.whl"
    with ZipFile(Path(folder, wheel), "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return wheel


def write_index(folder: Path, **versions: str) -> None:
    """Lay an index in the folder: for each package a page with the link to its wheel."""
    for name, version in versions.items():
        (folder / name).mkdir(parents=True)
        wheel = write_wheel(folder / name, name, version)
        (folder / name / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
