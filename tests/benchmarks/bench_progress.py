"""How long `python -m server progress` takes for a class that has done all exercises.

`python -m tests.benchmarks.bench_progress --people 50` starts a workshop's server with so many accounts, runs the
solutions as the first person, gives the others the same rows in the server's database, and times the table.
"""

import argparse
import hashlib
import re
import statistics
import tempfile
import time
from pathlib import Path

from demo_lib.config import LESSONS
from demo_lib.databases import connect
from demo_lib.exercises import EXERCISES

import papermill as pm
import sqlalchemy

from server.client import signed_in
from server.database import database_address
from server.participants import add, area, experiments
from server.progress import progress
from tests.server.conftest import workshop_in

ID = re.compile(r"(?:m-|tr-)?[0-9a-f]{32}")


def give_same(connection: sqlalchemy.Connection, files: Path, one: str, other: str, numbers: dict[str, str]) -> int:
    """Give the other person a copy of the first one's experiments, rows and files; return the number of rows."""
    tables = sqlalchemy.MetaData()
    tables.reflect(connection)
    places = {int(numbers[f"{one}/{each.partition('/')[2]}"]): int(numbers[each]) for each in area(other)}
    ids: set[str] = set()
    for table in tables.sorted_tables:  # what belongs to the experiments, by whatever key
        number = table.c.get("experiment_id")
        if number is not None and isinstance(number.type, sqlalchemy.Integer) and table.name != "experiments":
            rows = connection.execute(table.select().where(number.in_(places))).mappings()
            ids |= {value for row in rows for value in row.values() if isinstance(value, str) and ID.fullmatch(value)}
    inputs = tables.tables["inputs"]
    found = inputs.c.source_id.in_(ids) | inputs.c.destination_id.in_(ids)
    for row in connection.execute(inputs.select().where(found)).mappings():
        ids.add(row["input_uuid"])
    new = {each: each[:-32] + hashlib.md5(f"{other}{each}".encode()).hexdigest() for each in ids}

    def renamed(text: str) -> str:
        return ID.sub(lambda match: new.get(match[0], match[0]), text)

    def moved(name: str, value: object) -> object:
        if name == "experiment_id":
            return places.get(value, value)
        if not isinstance(value, str):
            return value
        value = re.sub(r"(?<=^mlflow-artifacts:/)\d+", lambda at: str(places.get(int(at[0]), at[0])), renamed(value))
        return re.sub(rf"^{one}\.", f"{other}.", value)

    count = 0
    for table in tables.sorted_tables:
        if table.name in ("experiments", "experiment_tags"):
            continue
        keys = [column for column in table.c if isinstance(column.type, sqlalchemy.String) and column.name != "value"]
        own = [column.in_(ids) for column in keys] + [
            column.like(f"{one}.%") for column in keys if column.name == "name"
        ]
        if not own:
            continue
        written = [column for column in table.c if column.computed is None]
        rows = connection.execute(sqlalchemy.select(*written).where(sqlalchemy.or_(*own))).mappings()
        copies = [{name: moved(name, value) for name, value in row.items()} for row in rows]
        if copies:
            connection.execute(table.insert(), copies)
            count += len(copies)
    for old, place in places.items():
        source = files / str(old)
        for path in (each for each in source.rglob("*") if each.is_file()):
            copy = files / str(place) / renamed(str(path.relative_to(source)))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.hardlink_to(path)
    return count


def main() -> None:
    """Print the median of three looks, and what was looked at."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--people", type=int, default=50)
    names = [f"p{number:02}" for number in range(parser.parse_args().people)]
    with tempfile.TemporaryDirectory() as folder, workshop_in(Path(folder)) as site:
        passwords: dict[str, str] = {}
        add(site.settings, names, passwords.update)
        with signed_in(site.url, names[0], passwords[names[0]]):
            for path in sorted((LESSONS / "solutions").glob("*.ipynb")):
                pm.execute_notebook(
                    path, f"{folder}/{path.name}", progress_bar=False, cwd=path.parent, kernel_name="python3"
                )
        numbers = experiments(site.settings)
        with connect(database_address(site.settings)) as connection:
            files = site.settings.artifact_folder
            rows = sum(give_same(connection, files, names[0], each, numbers) for each in names[1:])
            connection.commit()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            table = progress(site.settings)
            seconds.append(time.perf_counter() - started)
        passed = int(table.passed.sum())
        print(f"{len(names)} people, {passed} of {len(names) * len(EXERCISES)} exercises passed, {rows:,} rows copied")
        print(f"progress: {statistics.median(seconds):.1f} s ({', '.join(f'{each:.1f}' for each in seconds)})")


if __name__ == "__main__":
    main()
