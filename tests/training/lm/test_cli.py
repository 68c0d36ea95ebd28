"""The commands of the language-model job, from the options to the files."""

import re

import pytest
from typer.testing import CliRunner

from optax_structured.cli import app

LM = ["--task", "lm"]
TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--sequence", "16", "--batch-size", "2"]
SMALL = [*LM, *TINY, "--steps", "12", "--evaluate-every", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(
        "\n\n".join(f"{i} bottles of beer on the wall, {i} bottles." for i in range(99))
    )
    return file


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_train_writes_a_run_folder_and_resumes(tmp_path, text):
    run = tmp_path / "run"
    options = [*SMALL, "--recipe", "galore", "--rank", 4, "--period", 5, "--text", text]
    code, said = invoke("train", *options, "--out", run, "--stop-after", 3)
    assert code == 0, said
    code, said = invoke("train", "--resume", run, "--recipe", "galore", "--rank", "4")
    assert code == 0, said
    assert "block_0/attention/query/kernel" in said and "held-out perplexity" in said
    names = {path.name for path in run.iterdir()}
    tables = {"config.json", "metrics.csv", "losses.npy", "state.csv"}
    assert names >= tables | {"training.png", "checkpoints"}
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3
    (line,) = (x for x in (run / "state.csv").read_text().splitlines() if "query" in x)
    *described, state_bytes = line.split(",")
    assert described == ["block_0/attention/query/kernel", "16×16", "default", "4", "1024"]
    assert 4 * (3 * 4 * 16) <= int(state_bytes) < 2 * 1024


@pytest.mark.slow
def test_state_bits_are_said_and_stored(tmp_path, text):
    run = tmp_path / "run"
    sizes = [*TINY, "--width", "64", "--steps", "4", "--text", text]
    options = [*LM, *sizes, "--recipe", "adamw", "--state-bits", "8"]
    code, said = invoke("train", *options, "--out", run, "--stop-after", 2)
    assert code == 0, said
    assert "learning rate 0.003, 8-bit state" in said and "in codes of 8 or 4 bits" in said
    code, said = invoke("train", "--resume", run, "--state-bits", "4")
    assert code == 2 and "state_bits is 8 there and 4 here" in said
    code, said = invoke("train", "--resume", run)
    assert code == 0, said
    embedding = 256 * 64
    line = f"embed/embedding 256×64 {4 * embedding:,} {2 * embedding + 8 * 64:,} {2 * embedding:,}"
    assert line in said


@pytest.mark.slow
def test_compare_puts_bits_side_by_side(tmp_path, text):
    out = tmp_path / "compared"
    sizes = [*TINY, "--width", "64", "--steps", "4", "--text", text]
    recipes = "adamw,adamw:8,galore:4@keep,q_galore"
    keep = ["--set", "galore:4@keep.transport=keep"]
    options = [*LM, *sizes, "--recipes", recipes, *keep, "--learning-rates", "1e-3"]
    code, said = invoke("compare", *options, "--seeds", "0,1", "--out", out)
    assert code == 0, said
    table = [x for x in (out / "comparison.md").read_text().splitlines() if x.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]
    assert [row[0] for row in rows] == recipes.split(",")
    assert [row[6].endswith("8-bit state") for row in rows] == [False, True, False, True]
    assert rows[2][6].endswith("keep, 4-bit state")
    sizes = [int(row[3].replace(",", "")) for row in rows]
    assert sizes[1] < 0.3 * sizes[0] and sizes[2] < sizes[3]
    assert (out / "adamw-8-0.001-1" / "metrics.csv").exists()


@pytest.mark.slow
def test_compare_sweeps_and_continues(tmp_path, text):
    out = tmp_path / "compared"
    options = [*SMALL, "--text", text, "--recipes", "adamw,galore@keep", "--rank", "4"]
    sweep = ["--learning-rates", "1e-3,1e-2", "--set", "galore@keep.learning_rates=1e-2,1e15"]
    keep = ["--set", "galore@keep.transport=keep"]
    code, said = invoke("compare", *options, *sweep, *keep, "--seeds", "0", "--out", out)
    assert code == 0, said
    assert "galore@keep diverged at learning rate 1e+15" in said
    code, said = invoke("compare", *options, *sweep, *keep, "--seeds", "0,1", "--resume", out)
    assert code == 0, said
    table = [x for x in (out / "comparison.md").read_text().splitlines() if x.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == ["recipe", "adamw", "galore@keep"]
    assert all("±" in row[1] for row in rows[1:])
    assert rows[2][2] == "0.01 (edge)" and rows[1][5] == "1.00" and "keep" in rows[2][6]
    assert (out / "comparison.png").exists() and (out / "adamw-0.01-1" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--task", "speech"], "unknown task 'speech': choose one of images, lm"),
        (["train", *LM, "--recipe", "galor"], "unknown recipe 'galor'"),
        (["train", *LM, "--text", "no.txt"], "no text file no.txt"),
        (["train", *LM, "--recipe", "adamw", "--rank", "4"], "has no rank; leave --rank out"),
        (["train", *LM, "--strength", "1"], "--strength has no meaning for the task lm"),
        (["train", "--rank", "4"], "--rank has no meaning for the task images; leave it out"),
        (["train", *LM, "--sequence", "1000000"], "longer than the .* bytes of the training text"),
        (["train", *LM, "--rank", "0"], "rank must be a whole number of at least 1, got 0"),
        (["train", *LM, "--resume", "none"], "none is not a run folder"),
        (["compare", *LM, "--resume", "none"], "none holds no runs to continue: begin with --out"),
        (["compare", *LM, "--recipes", "galore,lion"], "unknown recipe 'lion'"),
        (["train", *LM, "--state-bits", "16"], "state_bits must be one of 32, 8, 4, got 16"),
        (["compare", *LM, "--recipes", "adamw:x"], "after the colon come the bits of the state"),
        (["compare", *LM, "--recipes", "adamw:7"], "state_bits must be one of 32, 8, 4, got 7"),
        (["compare", *LM, "--recipes", "adam:8"], "unknown recipe 'adam'"),
        (["compare", *LM, "--learning-rates", "a"], "--learning-rates takes numbers separated"),
        (["compare", *LM, "--set", "galore.rate=1"], "expected RECIPE.NAME=VALUE"),
        (["compare", *LM, "--set", "fira.rank=x"], "'x' is not a number"),
        (["compare", *LM, "--set", "fira.learning_rates=1"], "same number of learning rates"),
        (["compare", "--learning-rates", "1"], "--learning-rates has no meaning for the task im"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = invoke(*arguments)
    assert code == 2 and "Traceback" not in said
    assert said.startswith("error: ") and re.search(sentence, said), said
    assert not any(tmp_path.iterdir())


def test_a_run_is_resumed_with_its_own_task_and_text(tmp_path, text):
    run = tmp_path / "run"
    options = [*SMALL, "--recipe", "adamw", "--out", run, "--stop-after", 1]
    code, said = invoke("train", *options, "--text", text)
    assert code == 0, said
    other = tmp_path / "other.txt"
    other.write_text("another\n\ntext\n\n" * 9)
    for more, sentence in (
        (["--task", "images"], "holds a run of the task lm, not images"),
        (["--text", other], "is not the text of the run in"),
        (["--seed", "4"], "seed is 0 there and 4 here"),
    ):
        code, said = invoke("train", "--resume", run, *more)
        assert code == 2 and re.search(sentence, said), said
    code, said = invoke("compare", "--resume", tmp_path, "--task", "images")
    assert code == 2 and "holds a run of the task lm, not images" in said
    code, said = invoke("compare", "--resume", tmp_path, "--strength", "1")  # it knows the task
    assert code == 2 and "--strength has no meaning for the task lm" in said
