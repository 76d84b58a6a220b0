"""Configurations: ranges, sources, and the round trip through YAML, parameters and the command line."""

from demo_lib.config import DemoError, TrainConfig, read_yaml, settings, tracking_uri

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

CONFIGS = st.builds(
    TrainConfig,
    train_images=st.integers(200, 60_000),
    epochs=st.integers(1, 100),
    batch_size=st.integers(8, 4096),
    learning_rate=st.floats(1e-6, 1),
    weight_decay=st.floats(0, 1),
    channels=st.integers(4, 128),
    dropout=st.floats(0, 0.9),
    flip=st.booleans(),
    log_every=st.integers(1, 10_000),
    seed=st.integers(0, 2**31 - 1),
    device=st.sampled_from(["auto", "cpu", "cuda", "mps"]),
)


@given(CONFIGS)
def test_yaml_brings_the_same_configuration_back(config):
    assert TrainConfig(**yaml.safe_load(config.to_yaml())) == config


@given(CONFIGS)
def test_logged_parameters_bring_the_same_configuration_back(config):
    params = {name: str(value) for name, value in config.model_dump().items()}
    assert TrainConfig.from_params(params | {"other": "1"}) == config


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", 2.5, "a valid integer, got a number with a fractional part"),
        ("learning_rate", "fast", "a valid number, unable to parse string as a number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("flip", "maybe", "a valid boolean, unable to interpret input"),
        ("device", "tpu", "'auto', 'cpu', 'cuda' or 'mps'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(DemoError) as error:
        TrainConfig(**{field: value})
    assert str(error.value) == f"{field} = {value!r} is not allowed: it should be {allowed}."


def test_an_unknown_field_is_named_with_the_known_ones():
    with pytest.raises(DemoError, match=r"no field 'epoch'; it has train_images, epochs, batch_size"):
        TrainConfig(epoch=3)


def test_every_bound_is_stated_in_full():
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert len(field.metadata) == 2, f"{name} needs a lower and an upper bound"


def test_a_configuration_cannot_be_changed():
    with pytest.raises((DemoError, ValueError)):
        TrainConfig().epochs = 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "must hold one `name: value` a line, each name a word"),
        ("epochs: [1\n", "can't be read as YAML .*line 2"),
        ("5: 5\n", "must hold one `name: value` a line"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(DemoError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DemoError, match=r"none\.yaml can't be read as YAML .*No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "a.yaml").touch()
    assert read_yaml(tmp_path / "a.yaml") == {}


def test_a_bad_setting_names_its_variable(monkeypatch):
    monkeypatch.setenv("DEMO_UI_PORT", "99999")
    with pytest.raises(
        DemoError, match="DEMO_UI_PORT = '99999' is not allowed: it should be less than or equal to 65535"
    ):
        settings()


def test_a_relative_store_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert tracking_uri() == f"sqlite:///{tmp_path.as_posix()}/here.db"


def test_the_store_of_the_environment_wins(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    assert tracking_uri() == "https://example.org"


@pytest.mark.parametrize("name", ["what?", "50%"])
def test_a_home_whose_path_no_address_can_say_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.setenv("DEMO_HOME", str(tmp_path / name))
    with pytest.raises(DemoError, match=r"leave \? and % out of its address"):
        tracking_uri()
