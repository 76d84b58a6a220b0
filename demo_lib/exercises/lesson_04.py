"""What the exercises of lesson 04 expect: a model for its users, and the checkpoint to keep."""

import math

from demo_lib.exercises.evidence import Evidence, metrics_of
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, has_metric, listed, named
from demo_lib.exercises.quiz import Question, best_and_others, question

import mlflow
from mlflow.entities import Run
from mlflow.types import ColSpec, DataType, TensorSpec

LEAST = 0.6  # accuracy that the model reaches with its pixels divided, and not without


def _kind(spec: TensorSpec | ColSpec) -> str:
    return str(spec.type).removeprefix("DataType.")


def _takes(spec: TensorSpec | ColSpec) -> str:
    return f"{_kind(spec)} {tuple(spec.shape)}" if isinstance(spec, TensorSpec) else f"a column of {_kind(spec)}"


def _is_text(spec: TensorSpec | ColSpec) -> bool:
    return spec.type.kind in "UO" if isinstance(spec, TensorSpec) else spec.type == DataType.string


@exercise("04.1", "raw pixels in, words out")
def raw_pixels_in(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run with a model for users, by what its signature says and by its own metric."""
    yield finished(run)
    models = evidence.models(run)
    yield bool(models), f"{named(run)} has no model: log one with `mlflow.pyfunc.log_model`, in the run's `with` block."
    model = models[-1]
    about, of = evidence.description(model), f"the model `{model.name}` of {named(run)}"
    signature = about and about.signature
    yield (
        bool(signature and signature.inputs),
        f"{of} has no signature that can be read: give `log_model` two raw images as `input_example`.",
    )
    (taken, *more), returned = signature.inputs.inputs, signature.outputs.inputs if signature.outputs else []
    shape = tuple(taken.shape) if isinstance(taken, TensorSpec) else ()
    yield not more and shape, f"{of} takes {_takes(taken)}: users have an array of images. Give an array as example."
    yield (
        taken.type.kind == "u" or shape[1:] != (1, 28, 28),
        f"{of} takes {_takes(taken)}: that is the network itself. Wrap it in a `PythonModel` that takes raw images.",
    )
    yield (
        shape != (-1, 28) and shape[:1] == (-1,),
        f"{of} takes {_takes(taken)}: the first number is that of the images, and it must be free, -1. Take two images"
        ", `images[:2]`, as the example.",
    )
    yield (
        taken.type.name == "uint8" and shape == (-1, 28, 28),
        f"{of} takes {_takes(taken)}: users have uint8 (-1, 28, 28), as in `images`. The example decides this.",
    )
    kinds = [*map(_kind, returned)]
    yield (
        any(map(_is_text, returned)),
        f"{of} returns {listed(kinds) if kinds else 'nothing that its signature names'}, and words are asked for: take "
        "the name of the class from `CLASSES`.",
    )
    yield has_metric(run, model, "accuracy")
    own = metrics_of(model)
    yield (
        LEAST <= own["accuracy"] <= 1,
        f"{of} has `accuracy` {own['accuracy']:.3f}, and the network is right more often: it was trained on pixels "
        "from 0 to 1. Does `predict` divide them by 255?",
    )
    return (
        f"`{model.name}` takes {_takes(taken)} and returns words, and {own['accuracy']:.1%} of them are right. Its "
        "code is in the package: on the model's page in the UI, open the tab Artifacts."
    )


@exercise("04.2", "the checkpoint with the lowest loss")
def the_lowest_loss(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run with six checkpoints and a choice."""
    yield finished(run)
    models = evidence.models(run)
    yield (
        len(models) == 6,
        f"{named(run)} has {counted(len(models), 'model')}: six checkpoints are asked for, all in one run.",
    )
    own = {model.model_id: metrics_of(model) for model in models}
    for metric in ("val_loss", "val_accuracy"):
        without = [model.name for model in models if metric not in own[model.model_id]]
        alone = (
            " It is on the run alone: log it after the model, with `model_id`." if metric in run.data.metrics else ""
        )
        yield (
            not without,
            f"{len(without)} of the 6 models of {named(run)} have no `{metric}`: {listed(f'`{n}`' for n in without)}."
            f"{alone}",
        )
    losses = {each: math.inf if math.isnan(own[each]["val_loss"]) else own[each]["val_loss"] for each in own}
    yield (
        len(set(losses.values())) > 1,
        f"all 6 models of {named(run)} have the same `val_loss`: score each network as it is at its checkpoint.",
    )
    given, names = run.data.tags.get("chosen"), {model.model_id: model.name for model in models}
    on_model = any("chosen" in model.tags for model in models)
    where = " It is on a model: here the run says which it chose." if on_model else ""
    yield given is not None, f"{named(run)} has no tag `chosen`, the id of the model with the lowest `val_loss`.{where}"
    is_name = " This is its name, which another run may use, too." if given in names.values() else ""
    yield (
        given in names,
        f"{named(run)} has `chosen = {given[:60]}`: none of its models has this id.{is_name} The id is `model_id` of "
        "what `log_model` returns.",
    )
    lowest = min(losses.values())
    why = " It is the last one." if given == models[-1].model_id else ""
    if own[given]["val_accuracy"] == max(metrics["val_accuracy"] for metrics in own.values()):
        why = " It has the best `val_accuracy`, which is another question."
    yield (
        losses[given] == lowest,
        f"{named(run)} chose `{names[given]}` with `val_loss` {losses[given]:.3f}; the lowest is {lowest:.3f}.{why}",
    )
    others = [names[model_id] for model_id, metrics in own.items() if "test_accuracy" in metrics and model_id != given]
    where = f"on `{others[0]}`" if others else "on the run alone" if "test_accuracy" in run.data.metrics else "nowhere"
    yield (
        "test_accuracy" in own[given],
        f"the chosen model `{names[given]}` of {named(run)} has no `test_accuracy`; it is {where}. Log it with the "
        "`model_id` of the chosen one.",
    )
    yield (
        not others,
        f"{named(run)} has `test_accuracy` on {listed(f'`{name}`' for name in others)}, too: the test images are for "
        "the chosen model only, or they become part of the choice.",
    )
    return (
        f"`{names[given]}` has the lowest `val_loss`, {lowest:.3f}, and was scored once on the test images. In the UI, "
        "sort the experiment's page Models by `val_loss`, then by `val_accuracy`."
    )


@question("04")
def _own_checkpoint(evidence: Evidence) -> Question:
    """Ask about the checkpoints of the learner's lesson, if there are some."""
    place = evidence.place("04_package_a_model")
    found = mlflow.search_logged_models([place], output_format="list") if place else []
    scored = [model for model in found if "val_loss" in metrics_of(model)]
    last = [model for model in scored if model.source_run_id == scored[0].source_run_id]
    losses = {f"`{model.name}`": metrics_of(model)["val_loss"] for model in last}
    if ranked := best_and_others(losses, lowest=True, least=4):
        (best, low), others = ranked
        return Question(
            "Which of these checkpoints from your last lesson 04 has the lowest `val_loss`?",
            best,
            f"It has {low:.3f}. `search_logged_models` sorts by it.",
            {name: f"It has {loss:.3f}, and one of the others has less." for name, loss in others},
        )
    return Question(
        "Six checkpoints: the accuracy is best at the fifth, the loss is lowest at the second. How can that be?",
        "the network became too sure where it is wrong",
        "The loss counts how sure it is. The accuracy counts right answers only.",
        {
            "the second was scored on other images": "All were scored on the validation images.",
            "the loss is measured before the step": "Both are measured on the same network.",
            "one of the two numbers must be an error": "They are two questions, and can have two answers.",
        },
    )


@question("04")
def _one_image(evidence: Evidence) -> Question:
    return Question(
        "You log a network with one image as `input_example`, of shape (1, 1, 28, 28). What happens later?",
        "it refuses two images, though the signature allows them",
        "`torch.export` takes a batch of one for a constant. An example of two images leaves the number free.",
        {
            "it takes any number of images: an example is only a test": "The example is what `torch.export` follows.",
            "MLflow refuses to log it, as the batch is too small": "It is logged without a word.",
            "the signature allows one image only": "The signature says -1, any number, and is wrong about it.",
        },
    )


@question("04")
def _what_passes(evidence: Evidence) -> Question:
    return Question(
        "A network takes float32 (-1, 1, 28, 28) with pixels from 0 to 1. Which input passes the signature and gives "
        "wrong answers?",
        "float32 with pixels from 0 to 255",
        "A signature knows types and shapes, no ranges.",
        {
            "uint8 with pixels from 0 to 255": "Another type: it is refused, which is better than a wrong answer.",
            "float64 with pixels from 0 to 1": "Another type: it is refused, as MLflow converts no arrays.",
            "float32 without the axis of the channel": "Another shape: it is refused.",
        },
    )
