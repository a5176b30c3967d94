"""Each registry: a row that is added while the program runs appears, and works, everywhere."""

import csv
import json

import pytest

from polyseg import choices
from polyseg.choices import LOSSES, Loss
from polyseg.cli.options import help_of
from polyseg.commands.train import train
from polyseg.config import Config, settings_of, template
from polyseg.errors import PolysegError
from polyseg.registry import Registry
from tests import reference

REGISTRIES = {name: one for name, one in vars(choices).items() if isinstance(one, Registry)}


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_row_leads_to_its_function_and_has_help(name):
    for row in REGISTRIES[name].values():
        assert row.help and not row.help.endswith(".")
        assert not row.function or callable(row.resolve())


def choices_of(key):
    return next(one["choices"] for one in settings_of() if one["key"] == key)


def assert_listed(key, name, text):
    """Check that a value of a setting stands in its choices, the template, schema and page."""
    assert choices_of(key)[name] == text
    assert f"#   {name}: {text}" in template()
    assert f"`{name}`: {text}" in reference.configuration_page()
    assert json.dumps(name) in json.dumps(Config.model_json_schema())


def history_of(run):
    with (run / "history.csv").open() as stream:
        return list(csv.DictReader(stream))


def steep(config):
    """Return a loss with an epsilon, but none of polyseg's."""
    return lambda logits, mask, epsilon: (
        (1 + epsilon) * (logits.sigmoid() - mask).square().flatten(1).mean(dim=1)
    )


def test_a_loss_is_one_row(monkeypatch, tiny, tmp_path):
    with pytest.raises(PolysegError, match="'stepe' is not a loss: choose polydice1"):
        tiny("run", "loss.name=stepe")
    row = Loss("steep", "weighted Brier score", "tests.test_registries:steep", has_epsilon=True)
    monkeypatch.setitem(LOSSES, "steep", row)
    assert_listed("loss.name", "steep", "weighted Brier score")
    assert "steep (weighted Brier score)" in help_of(LOSSES.choices())
    with pytest.raises(PolysegError, match="did you mean steep"):
        tiny("run", "loss.name=stepe")
    train(config := tiny("run", "loss.name=steep", "loss.epsilon=0.5", "control.start=1"))
    assert config.adaptive
    rows = history_of(tmp_path / "run")
    assert 0 < float(rows[-1]["train_loss"]) < 2
    # The constant epsilon is 0.5 until the assessment, and what it sets is another after that.
    assert rows[0]["epsilon_q05"] == rows[0]["epsilon_q95"] == "0.5" != rows[-1]["epsilon_q95"]
