"""What the exercises of lesson 06 expect: scores that know their model, and traces."""

import json
from typing import Any

from demo_lib.exercises.evidence import Evidence, model_id
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run, Span, Trace
from mlflow.tracing.constant import TraceMetadataKey

TABLE = "predictions.json"
ROWS, CALLS, BATCH = 500, 10, 64


def _scorers(evidence: Evidence) -> dict[str, str]:
    """Return which model each alias of the setup's registered model stands for."""
    versions = evidence.versions_of([run for run in evidence.runs if run.data.tags.get("setup") == "06.1"])
    models = {(version.name, str(version.version)): model_id(version) for version in versions}
    names = {version.name for version in versions}
    return {alias: models.get((name, at), "") for name in names for alias, at in evidence.aliases(name).items()}


def _rows(text: str | None) -> list[dict[str, Any]]:
    """Return the rows of a table as `mlflow.log_table` writes it; none if the text is no such table."""
    try:
        table = json.loads(text or "")
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    except (ValueError, TypeError, KeyError):
        return []


@exercise("06.1", "score with the version before")
def score_with_the_version_before(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run that scored images with the version `previous`."""
    yield finished(run)
    scorers = _scorers(evidence)
    yield (
        "previous" in scorers,
        "there is no version with the alias `previous`: run the cell that registers two versions again.",
    )
    paths = [each.path for each in evidence.files(run)]
    rows = _rows(evidence.text(run, TABLE))
    paths = listed(f"`{path}`" for path in paths)
    kind = "has no table" if TABLE not in paths else "has no rows that can be read in"
    yield (
        bool(rows),
        f"{named(run)} {kind} `{TABLE}`: it has {paths}. `mlflow.log_table` writes one.",
    )
    columns = listed(f"`{column}`" for column in rows[0])
    yield (
        {"label", "truth"} <= rows[0].keys(),
        f"`{TABLE}` of {named(run)} has the columns {columns}: it needs both, `label` and `truth`.",
    )
    yield (
        len(rows) == ROWS,
        f"`{TABLE}` of {named(run)} has {counted(len(rows), 'row')}, one an image: {ROWS} images are asked for.",
    )
    labels, truths = ({str(row[column]) for row in rows} for column in ("label", "truth"))
    yield (
        bool(labels & truths),
        f"`{TABLE}` of {named(run)} has a `label` such as `{min(labels)}` and a `truth` such as `{min(truths)}`: no "
        "row can be right. Turn label numbers into words with `CLASSES`.",
    )
    metrics = run.data.metrics
    yield "test_accuracy" in metrics, f"{named(run)} has no metric `test_accuracy`; it has {listed(metrics)}."
    right = sum(row["label"] == row["truth"] for row in rows) / len(rows)
    yield (
        abs(metrics["test_accuracy"] - right) < 1e-6,
        f"{named(run)} has `test_accuracy = {metrics['test_accuracy']:.4g}`, but {right:.4g} of its table's rows are "
        "right: calculate it from the same images.",
    )
    models = evidence.scored(run, "test_accuracy")
    yield (
        bool(models),
        f"`test_accuracy` of {named(run)} belongs to none of the setup's models: give `log_metric` the `model_id` of "
        "the version that you loaded.",
    )
    others = [alias for alias, model in scorers.items() if model in models]
    what = f"that of the alias `{others[0]}`" if others else "one that the setup did not register"
    yield (
        scorers["previous"] in models,
        f"`test_accuracy` of {named(run)} belongs to another model, {what}: the version `previous` is asked for.",
    )
    return (
        f"{ROWS} images, {right:.1%} right, and the score belongs to the model of version `previous`. In the UI, that "
        "model's page lists it. How far is `champion` from it?"
    )


def _root(trace: Trace) -> Span | None:
    return next((span for span in trace.data.spans if span.parent_id is None), None)


def _model_of(trace: Trace) -> str | None:
    return trace.info.trace_metadata.get(TraceMetadataKey.MODEL_ID)


@exercise("06.2", "ten traced calls")
def ten_traced_calls(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run with ten traces."""
    yield finished(run)
    traces = evidence.traces(run)
    yield (
        bool(traces),
        f"{named(run)} has no trace: decorate the function with `mlflow.trace`, and call it inside of the run's "
        "`with` block. A call after the block makes a trace that belongs to no run.",
    )
    yield (
        len(traces) == CALLS,
        f"{named(run)} has {counted(len(traces), 'trace')}: each call makes one, and ten calls are asked for.",
    )
    bad = [trace for trace in traces if str(trace.info.state.value) != "OK"]
    yield not bad, f"{counted(len(bad), 'trace')} of {named(run)} ended in an error: correct the function."
    for trace in traces:
        names = [span.name for span in trace.data.spans]
        below = [span.name for span in trace.data.spans if span.parent_id is not None]
        yield (
            "decode" in below,
            f"a trace of {named(run)} has the spans {listed(f'`{name}`' for name in names)}: inside of the traced "
            'function, open one with `mlflow.start_span("decode")`.',
        )
        root = _root(trace)
        words = root.outputs if root else None
        yield (
            isinstance(words, list) and all(isinstance(word, str) for word in words),
            f"the traced function of {named(run)} returned no list of words: its result is kept as "
            f"`{str(words)[:40]}`.",
        )
        yield (
            len(words) == BATCH,
            f"a call of {named(run)} returned {counted(len(words), 'word')}: each call is for {BATCH} images.",
        )
    unlinked = [trace for trace in traces if not _model_of(trace)]
    yield (
        not unlinked,
        f"{len(unlinked)} of {CALLS} traces of {named(run)} name no model: call `mlflow.set_active_model` with the "
        "champion's `model_id` before.",
    )
    scorers = _scorers(evidence)
    strange = next((_model_of(trace) for trace in traces if _model_of(trace) != scorers.get("champion")), None)
    other = next((f"that of the alias `{alias}`" for alias, model in scorers.items() if model == strange), "another")
    yield (
        strange is None,
        f"a trace of {named(run)} names a model which is not the champion's but {other}: `mlflow.set_active_model` "
        "needs the `model_id` of the alias `champion`.",
    )
    return (
        "Ten traces, each with its span `decode`, and all know run and model. In the UI, the run's tab Traces shows "
        "how long each span took: is it the network, or the words?"
    )


@question("06")
def _own_spans(evidence: Evidence) -> Question:
    """Ask about the learner's own traces, if there are some with several steps."""
    for run in evidence.tagged("06.2")[:3]:
        spent: dict[str, list[float]] = {}
        for trace in evidence.traces(run, wait=False):
            for span in trace.data.spans:
                if span.parent_id is not None and span.end_time_ns:
                    spent.setdefault(span.name, []).append((span.end_time_ns - span.start_time_ns) / 1e6)
        means = {name: sum(each) / len(each) for name, each in spent.items()}
        ranked = sorted(means.items(), key=lambda each: -each[1])
        if len(ranked) > 1 and ranked[0][1] > 1.2 * ranked[1][1]:
            (slow, most), *others = ranked[:3]
            return Question(
                f"In the traces of your run `{run.info.run_name}`, which span takes the longest, on average?",
                f"`{slow}`",
                f"It takes {most:.2f} ms.",
                {f"`{name}`": f"It takes {mean:.2f} ms, and another one more." for name, mean in others}
                | {"all take the same time": "Look at a trace in the UI: the bars have different lengths."},
            )
    return Question(
        "A trace has three spans: `classify` 5 ms, and below it `network` 4 ms and `decode` 0.2 ms. What comes first "
        "if the call is too slow?",
        "a look at `network`",
        "It is the longest of the steps.",
        {
            "a look at `classify`": "That is the whole call. Its time is that of the steps below it.",
            "a look at `decode`": "Without it the call would still take nearly as long.",
            "a further span": "It shows more, and makes nothing faster.",
        },
    )


@question("06")
def _moved_alias(evidence: Evidence) -> Question:
    return Question(
        "A scoring server was started with `models:/shop@champion`. Then version 4 becomes the champion. Which version "
        "answers?",
        "the former champion",
        "The server looked the alias up once, at its start.",
        {
            "version 4": "The server would have to load it, and nobody has told it to.",
            "none: the server stops": "A moved alias is a change in the registry. The server does not notice it.",
            "each in turn": "One server has loaded one model.",
        },
    )


@question("06")
def _fractions(evidence: Evidence) -> Question:
    return Question(
        "A model's signature asks for pixels from 0 to 255, as `uint8`. You send JSON with pixels from 0 to 1, such as "
        "0.7. What comes back?",
        "status 200, and labels that are mostly wrong",
        "The server cuts the fractions off, so that nearly every pixel is 0.",
        {
            "status 400, as 0.7 is no whole number": "What is out of range is refused. 0.7 is within 0 and 255.",
            "status 200, and the right labels": "Then the server would have to know by what you divided.",
            "status 500, as the model fails": "The model gets whole numbers in the right shape. It has no reason to.",
        },
    )
