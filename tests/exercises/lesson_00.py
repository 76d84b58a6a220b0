"""Attempts at the exercises of lesson 00."""

import mlflow

from tests.exercises.attempts import two_sittings, wrong

ONE, TEN = {"exercise": "00.1"}, {"exercise": "00.2"}


def seed_run(seed, mean=None):
    with mlflow.start_run(tags=ONE):
        mlflow.log_param("seed", seed)
        mlflow.log_metric("mean_pixel", 73 + seed / 10 if mean is None else mean)


@wrong("00.1", r"is FAILED and has `seed = 0`: a parameter can't change")
def the_loop_inside_one_run():
    try:
        with mlflow.start_run(tags=ONE):
            for seed in range(3):
                mlflow.log_param("seed", seed)
                mlflow.log_metric("mean_pixel", 73.0)
    except mlflow.MlflowException:
        pass


@wrong("00.1", r"no parameter `seed`, but a metric of that name")
def the_seed_as_a_metric():
    for seed in range(3):
        with mlflow.start_run(tags=ONE):
            mlflow.log_metric("seed", seed)
            mlflow.log_metric("mean_pixel", 73.0)


@wrong("00.1", r"is RUNNING: it was never ended")
def logged_without_with():
    mlflow.log_param("seed", 0)
    mlflow.log_metric("mean_pixel", 73.0)
    mlflow.set_tag("exercise", "00.1")


@wrong("00.1", r"`mean_pixel = 0\.286`: the mean of all pixels, from 0 to 255")
def pixels_divided_by_255():
    for seed in range(3):
        seed_run(seed, 0.286)


@wrong("00.1", r"all seeds have `mean_pixel = 72\.9`: another seed draws other images")
def the_seed_not_given_to_the_data():
    for seed in range(3):
        seed_run(seed, 72.9)


@wrong("00.1", r"good run for seed 0 and 1, none for 2")
def two_seeds_of_three():
    seed_run(0)
    seed_run(1)


@two_sittings("00.1")
def two_seeds_today_one_tomorrow():
    seed_run(0)
    seed_run(1)
    yield
    seed_run(2)


MEANS = [83, 57, 96, 66, 98, 35, 85, 43, 90, 77]


@wrong("00.2", r"ten values of `mean_pixel`, all at step 0")
def no_step():
    with mlflow.start_run(tags=TEN):
        for mean in MEANS:
            mlflow.log_metric("mean_pixel", mean)


@wrong("00.2", r"no metric `mean_pixel`, but 10 metrics of other names")
def ten_names():
    with mlflow.start_run(tags=TEN):
        for label, mean in enumerate(MEANS):
            mlflow.log_metric(f"mean_pixel_{label}", mean)


@wrong("00.2", r"has 1 value of `mean_pixel`, and ten are asked for")
def ten_runs():
    for mean in MEANS:
        with mlflow.start_run(tags=TEN):
            mlflow.log_metric("mean_pixel", mean)


@wrong("00.2", r"has the steps 1, 2, 3, 4, 5, 6, 7 and 3 more: classes go from 0 to 9")
def steps_from_one():
    with mlflow.start_run(tags=TEN):
        for label, mean in enumerate(MEANS, 1):
            mlflow.log_metric("mean_pixel", mean, step=label)


@wrong("00.2", r"has 57 at step 0: the mean of class 0 is near 83")
def single_images_instead_of_classes():
    with mlflow.start_run(tags=TEN):
        for label in range(10):
            mlflow.log_metric("mean_pixel", 57 + 9 * label, step=label)


@two_sittings("00.2")
def the_run_opened_again():
    with mlflow.start_run(tags=TEN) as run:
        for label in range(5):
            mlflow.log_metric("mean_pixel", MEANS[label], step=label)
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        for label in range(5, 10):
            mlflow.log_metric("mean_pixel", MEANS[label], step=label)
