"""What the README says about speed is what `make bench` measured, and nothing else of the machine is in that file."""

import copy
import json
from dataclasses import asdict

import pytest

from tests.benchmarks.readme import KEPT, README, updated
from tests.benchmarks.rows import ROWS, Row, machine


@pytest.fixture
def report():
    return json.loads(KEPT.read_text("utf-8"))


def test_the_readme_has_the_figures_of_the_kept_measures(report):
    text = README.read_text("utf-8")
    assert text == updated(text, report), "run `python -m tests.benchmarks.readme docs/bench.json`"


@pytest.mark.parametrize("key", ROWS)
def test_another_figure_would_be_another_readme(report, key):
    changed = copy.deepcopy(report)
    next(row for row in changed["rows"] if row["key"] == key)["ours"] += 1000
    assert updated(README.read_text("utf-8"), changed) != updated(README.read_text("utf-8"), report)


def test_the_kept_measures_are_those_of_today(report):
    kept = {row["key"]: {name: row[name] for name in asdict(ROWS["copy"])} for row in report["rows"]}
    assert kept == {key: asdict(kind) for key, kind in ROWS.items()}, "run `make bench`, then tests.benchmarks.readme"


def test_a_row_is_its_medians(report):
    for each in report["rows"]:
        row = Row(each["key"], each["baseline_repeats"], each["our_repeats"])
        assert row.to_json() == each


def test_the_kept_measures_name_no_path_host_or_person(report):
    assert report.keys() == {"machine", "seconds", "rows"} and report["machine"].keys() == machine().keys()
    texts = [*report["machine"].values(), *(value for row in report["rows"] for value in row.values())]
    assert not [text for text in texts if isinstance(text, str) and set(text) & set("/\\@")]


@pytest.mark.parametrize(
    ("key", "baseline", "ours", "met"),
    [
        ("batches", 10, 0.1, True),
        ("batches", 10, 0.11, False),
        ("copy", 1, 3, True),
        ("copy", 1, 3.1, False),
        ("SQLite", 1, 1.015, True),
        ("SQLite", 1, 1.025, False),
        ("trial memory", 1, 90, True),
        ("trial memory", 1, 110, False),
    ],
)
def test_a_row_says_whether_its_limit_is_kept(key, baseline, ours, met):
    assert Row(key, [baseline, baseline, 1e9], [ours, ours, 0]).met == met  # the median
    assert Row("quick", [], [60]).met and not Row("quick", [], [61]).met
    assert Row("full accuracy", [], [93.0]).met and not Row("full accuracy", [], [92.9]).met
