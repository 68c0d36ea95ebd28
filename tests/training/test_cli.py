"""The commands, from the options to the files."""

import re

import pytest
from typer.testing import CliRunner

from optax_structured.cli import app

SMALL = ["--model", "logistic", "--epochs", "4", "--stages", "2", "--batch-size", "128"]


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_train_writes_a_run_folder_and_resumes(tmp_path):
    run = tmp_path / "run"
    code, said = invoke("train", *SMALL, "--out", run, "--stop-after", 2)
    assert code == 0, said
    code, said = invoke("train", "--resume", run, "--epochs", 4)
    assert code == 0, said
    assert "Dense_0/kernel" in said and "distance to stationarity" in said
    names = {path.name for path in run.iterdir()}
    pictures = {"training.png", "layers.png"}
    assert names == pictures | {"config.json", "metrics.csv", "strips.npz", "checkpoints"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 4


def test_compare_writes_a_table_and_continues(tmp_path):
    out = tmp_path / "compared"
    options = ["--recipes", "adamw,ramda", *SMALL, "--strength", "0.01", "--set", "ramda.eps=1e-5"]
    code, said = invoke("compare", *options, "--seeds", "0", "--out", out)
    assert code == 0, said
    code, said = invoke("compare", *options, "--seeds", "0,1", "--resume", out)
    assert code == 0, said
    lines = (out / "comparison.md").read_text().splitlines()
    assert "seeds 0, 1" in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("| ")] == [
        "recipe",
        "adamw",
        "ramda",
    ]
    assert "strength 0.01" in lines[-1] and "eps 1e-05" in lines[-1] and "±" in lines[-1]
    assert "strength" not in lines[-2]
    assert (out / "comparison.png").exists() and (out / "ramda-1" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--recipe", "rambda"], "unknown recipe 'rambda': .* did you mean 'ramda'?"),
        (["train", "--data", "fashion-mnist", "--data-dir", "none"], "dataset-fashion-mnist"),
        (["train", "--model", "lenet"], "use --model conv"),
        (["train", "--learning-rate", "-1"], "learning_rate must be"),
        (["train", "--milestones", "2;3"], "--milestones takes whole numbers .* got '2;3'"),
        (["train", "--resume", "none"], "none is not a run folder"),
        (["train", "--resume", "a", "--out", "b"], "not both"),
        (["compare", "--recipes", "ramda,sgd"], "unknown recipe 'sgd'"),
        (["compare", "--seeds", "a"], "--seeds takes whole numbers"),
        (["compare", "--set", "ramda.rate=1"], "expected RECIPE.NAME=VALUE"),
        (["compare", "--set", "ramda.eps=small"], "'small' is not a number"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = invoke(*arguments)
    assert code == 2 and "Traceback" not in said
    assert said.startswith("error: ") and re.search(sentence, said), said
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for command in ("train", "compare"):
        code, said = invoke(command, *SMALL, "--out", tmp_path)
        assert code == 2 and "is not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_names_the_choices():
    code, said = invoke("train", "--help")
    assert code == 0 and "--recipe" in said and "prox_ssi" in said
