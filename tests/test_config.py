"""The configuration: accepted values, refused values, and error messages."""

import itertools
import json
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from polyseg.config import (
    Config,
    ControlConfig,
    build_config,
    least_epsilon,
    load_config,
    settings_of,
    template,
)
from polyseg.errors import PolysegError
from polyseg.losses import polydice1_curve
from polyseg.system.yaml import parse_yaml


def test_every_setting_has_a_description_and_every_number_bounds():
    for setting in settings_of():
        assert setting["description"], setting["key"]
        if isinstance(setting["default"], int | float) and not isinstance(setting["default"], bool):
            assert setting["bounds"] or setting["key"] == "data.size", setting["key"]


def literals_of(annotation):
    """Return the choices of a setting with this type, unless it is a union with other types."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def test_every_choice_of_a_setting_is_explained():
    explained = {setting["key"]: setting["choices"] for setting in settings_of()}
    template_lines = template().splitlines()
    found = 0
    for section, config in Config():
        for name, field in type(config).model_fields.items():
            if words := literals_of(field.annotation):
                found += 1
                assert list(explained[f"{section}.{name}"]) == list(words), name
                for word, text in explained[f"{section}.{name}"].items():
                    assert text and f"  #   {word}: {text}" in template_lines
    assert found >= 18


def test_template_holds_the_defaults():
    text = template()
    assert build_config(yaml.safe_load(text), "template") == Config()
    assert all(f"  {s['key'].split('.')[-1]}: " in text for s in settings_of())


def test_yaml_round_trip(tmp_path):
    config = load_config(overrides=["data.size=[64, 96]", "loss.name=bce", "network.kwargs={a: 1}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_replace_values_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("training: {epochs: 7, seed: 3}\n")
    config = load_config(file, ["training.epochs=9"])
    assert (config.training.epochs, config.training.seed) == (9, 3)


def test_schema_is_valid_json():
    assert "LossConfig" in json.dumps(Config.model_json_schema())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.epsilon=-0.51", r"loss\.epsilon: must be greater than or equal to -0\.5"),
        ("control.epsilon_min=-1", r"control\.epsilon_min: .* -0\.5, got -1"),
        ("loss.epsilom=1", r"loss\.epsilom: unknown key; did you mean loss\.epsilon\?"),
        ("los.name=dice", "los: unknown key; did you mean loss"),
        ("data.size=big", r"data\.size: 'big' is not valid: size of the network"),
        ("data.split=[1, 2, 3]", r"data\.split .* three shares"),
        (
            "control.start=2.5",
            r"control\.start 2\.5: give a whole number of epochs, or a share below 1",
        ),
        ("control.start=31", r"control\.start 31 is beyond training\.epochs 30"),
        ("loss.name=polydice", r"control\.epsilon_min -0\.4 would reward .* at least -0\.319"),
        ("control.epsilon_min=2", r"control\.epsilon_min 2\.0 is above epsilon_max 1\.0"),
        ("network.dropout=0", r"network\.dropout is 0"),
        ("training.learning_rate=.nan", "finite"),
        ("uncertainty.samples=1", "2 to 10,000"),
        ("loss", "write KEY=VALUE"),
        ("loss.name.x=1", r"loss\.name: must be .*, got {'x': 1}"),
        ("training.epochs=!!python/object/apply:os.getcwd []", "tags"),
        ("training.epochs=" + "[" * 40_000, "is nested over 30 levels"),
        ("network.kwargs={a: &x 1, b: *x}", "aliases"),
        ("network.kwargs={a: 1, b: 2, a: 3}", "a is repeated in line 1"),
        ("control.start=true", r"control\.start: must be a number, got True"),
        ("training.epochs=true", r"training\.epochs: must be a whole number, got True"),
        ("training.epochs=1_0", r"training\.epochs: .* whole number, got '1_0'"),
        ("training.epochs=0o17", r"training\.epochs: .* whole number, got '0o17'"),
        ("training.epochs=017", r"training\.epochs: .* whole number, got '017'"),
        ("training.epochs='3'", r"training\.epochs: .* whole number, got '3'"),
        ("training.epochs=1:30", r"training\.epochs: .* whole number, got '1:30'"),
        ("control.start=2026-01-01", r"control\.start: .* number, got '2026-01-01'"),
        ("output.figures=no", r"output\.figures: must be true or false, got 'no'"),
        ("output.figures=1", r"output\.figures: must be true or false, got 1"),
        ("training.learning_rate=1e400", "finite"),
        ('data.path="a\\0b"', r"data\.path: 'a\\x00b' contains a control character"),
        ('data.cache="a\\nb"', r"data\.cache: 'a\\nb' contains a control character"),
        ('network.kwargs={"a\\0": 1}', r"network\.kwargs: 'a\\x00' contains a control character"),
        ("data.masks=Masken #1", "YAML ignores the text after #"),
    ],
)
def test_invalid_value_gives_one_line_that_names_the_setting(override, expected):
    with pytest.raises(PolysegError, match=expected) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)


def test_control_with_a_loss_without_epsilon_is_an_error():
    with pytest.raises(PolysegError, match="dice has no epsilon to adapt"):
        load_config(overrides=["loss.name=dice", "control.enabled=true"])
    assert not load_config(overrides=["loss.name=dice"]).adaptive
    assert load_config().adaptive


def test_all_problems_are_reported_together():
    with pytest.raises(PolysegError, match=r"a: loss\.name.*; training\.epochs"):
        build_config({"training": {"epochs": 0}, "loss": {"name": "none"}}, "a")


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(PolysegError, match=r"missing\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolysegError, match="is not a text file"):
        load_config(binary)


@given(st.text(max_size=200))
def test_any_yaml_text_is_parsed_or_refused(text):
    try:
        build_config(parse_yaml(text, "text"), "text")
    except PolysegError as error:
        assert str(error).startswith("text")


@given(st.integers(1, 300), st.floats(0, 0.999), st.integers(1, 40))
def test_assessment_epochs(epochs, start, every):
    moments = ControlConfig(start=start, every=every).assessment_epochs(epochs)
    assert moments == sorted(set(moments))
    assert all(0 <= moment <= epochs for moment in moments)
    assert all(b - a == every for a, b in itertools.pairwise(moments))
    if moments:
        assert abs(moments[0] - start * epochs) <= 1
        assert moments[-1] + every > epochs


def test_default_assessment_epochs_follow_the_paper():
    """E0 is 20 % of the epochs and tau is 5; an assessment may follow the last epoch."""
    assert ControlConfig().assessment_epochs(40) == [8, 13, 18, 23, 28, 33, 38]
    assert ControlConfig(start=10, every=10).assessment_epochs(40) == [10, 20, 30, 40]


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 10])
def test_smallest_epsilon_is_the_last_that_does_not_reward_misalignment(terms):
    theta = np.linspace(0, np.pi / 2, 2000)
    for change, falls in ((1e-3, False), (-1e-3, True)):
        curve = polydice1_curve(theta, least_epsilon(terms) + change, 1.0, terms=terms)
        assert (np.diff(curve) < 0).any() == falls


def test_number_of_terms_bounds_every_epsilon():
    settings = ["loss.name=polydice", "loss.terms=2", "control.epsilon_min=-0.2"]
    load_config(overrides=settings)
    load_config(overrides=["loss.name=polydice", "control.enabled=false"])
    with pytest.raises(PolysegError, match=r"loss\.epsilon -0\.3 would reward misalignment"):
        load_config(overrides=[*settings, "loss.epsilon=-0.3"])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ("{bias: .nan}", "only numbers, text"),
        ("{bias: !!binary gIE=}", "tags"),
        ("{channels: [1000000]}", "1000000|1e\\+06 is above 4096"),
        ("{a: {1: 2}}", "only numbers, text"),
        ("{channels: [0, 8]}", r"\[0, 8\] has numbers below 1"),
        ("{strides: [-2]}", r"\[-2\] has numbers below 1"),
        ("{channels: [4, 20000]}", "20000 is above 4096"),
        ("{strides: [" + "2, " * 20 + "2]}", "over 16 entries"),
    ],
)
def test_network_arguments_must_be_plain_and_small(kwargs, match):
    with pytest.raises(PolysegError, match=match):
        load_config(overrides=[f"network.kwargs={kwargs}"])


def test_network_arguments_accept_lists_with_zeros():
    load_config(overrides=["network.name=mine:make", "network.kwargs={padding: [0, 1]}"])


def test_empty_section_has_the_defaults():
    assert build_config({"loss": None}, "a.yaml") == Config()


@pytest.mark.parametrize("tree", [[], [1], 0, False, "words", {1: 2}, {None: {}}, {"data": [1]}])
def test_yaml_without_settings_is_refused(tree):
    with pytest.raises(PolysegError, match=r"^a\.yaml: [^:]") as error:
        build_config(tree, "a.yaml")
    assert "\n" not in str(error.value)


def test_file_with_a_single_value_is_refused(tmp_path):
    for text in ("false", "0", "[]", "''"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(PolysegError, match=r"a\.yaml: holds no settings"):
            load_config(tmp_path / "a.yaml")
        with pytest.raises(PolysegError, match=r"a\.yaml: holds no settings"):
            load_config(tmp_path / "a.yaml", overrides=["loss.epsilon=1"])


def test_duplicate_key_error_names_key_and_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  epochs: 3\nloss: {name: dice}\ntraining:\n  epochs: 9\n")
    with pytest.raises(PolysegError, match=r"a\.yaml: .*training is repeated in line 4"):
        load_config(path)


def test_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(PolysegError, match="cannot be read: is not a file"):
            load_config(path)


def test_numbers_of_overrides_are_parsed_as_written():
    config = load_config(
        overrides=["training.learning_rate=1e-3", "control.start=3", "loss.epsilon=-.25"]
    )
    assert (config.training.learning_rate, config.loss.epsilon) == (1e-3, -0.25)
    assert config.control.start == 3.0 and isinstance(config.control.start, float)


@pytest.mark.parametrize(
    "word", ["no", "1_0", "1e-3", "017", "2026-01-01", "1:30", "~", "true", "="]
)
def test_strings_that_look_like_other_types_round_trip(tmp_path, word):
    config = build_config({"data": {"images": word}}, "a")
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "a.yaml") == config
    assert yaml.safe_load(config.to_yaml())["data"]["images"] == word


@given(st.text(max_size=30))
def test_any_string_setting_round_trips_or_is_refused(text):
    try:
        config = build_config({"data": {"images": text}}, "a")
    except PolysegError as error:
        assert str(error).startswith("a: data.images: ") and "\n" not in str(error)
        return
    assert build_config(parse_yaml(config.to_yaml(), "again"), "again") == config


def test_long_list_of_problems_is_shortened():
    with pytest.raises(PolysegError, match="and 95 more") as error:
        build_config({f"key{i}": i for i in range(100)}, "a.yaml")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "line", ["seed: 0x" + "f" * 8000, "learning_rate: 9" + ":59" * 900], ids=["hex", "base 60"]
)
def test_huge_numbers_are_refused(tmp_path, line):
    path = tmp_path / "a.yaml"
    path.write_text(f"training:\n  {line}\n")
    with pytest.raises(PolysegError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("given", "tasks", "labels"),
    [
        ("2", {"2": (2,)}, ("",)),
        ("[[1, 2]]", {"1+2": (1, 2)}, ("",)),
        ("[1, [2, 3]]", {"1": (1,), "2+3": (2, 3)}, ("1", "2+3")),
        ("{liver: [1, 2], tumour: 2}", {"liver": (1, 2), "tumour": (2,)}, ("liver", "tumour")),
    ],
)
def test_foreground_setting_defines_tasks_and_labels(given, tasks, labels):
    config = load_config(overrides=[f"data.foreground={given}"])
    assert config.data.tasks == tasks and config.data.labels == labels
    assert build_config(yaml.safe_load(config.to_yaml()), "again") == config


@pytest.mark.parametrize(
    "given",
    [
        "[]",
        "[[]]",
        "[1, 1]",
        "[0, 0]",
        "-1",
        "70000",
        "{a: 1, b: 1}",
        "{'': 1, b: 2}",
        "{a: []}",
        "{../a: 1, b: 2}",
        "{.a: 1, b: 2}",
        "{a/b: 1, c: 2}",
        "[[1, 2], [2, 1]]",
    ],
)
def test_invalid_foregrounds_are_refused(given):
    with pytest.raises(PolysegError, match=r"data\.foreground: "):
        load_config(overrides=[f"data.foreground={given}"])


def test_quoted_name_may_contain_a_number_sign():
    assert load_config(overrides=['data.masks="Masken #1"']).data.masks == "Masken #1"
    assert load_config(overrides=["data.masks=a#1"]).data.masks == "a#1"
