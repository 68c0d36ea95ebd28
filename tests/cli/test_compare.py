"""`optax-structured compare`: recipes side by side."""

import importlib
import re
import shutil

import pytest
from cli_runs import IMAGES, LM, TINY, invoke, write_text

from optax_structured.training.images.task import Images
from optax_structured.training.lm.task import LanguageModel

compare = importlib.import_module("optax_structured.cli.compare")  # the name is the command's

ADAM_AND_GALORE = ["--recipes", "adamw,galore@keep", "--rank", "4"]


def table(out):
    lines = [x for x in (out / "comparison.md").read_text().splitlines() if x.startswith("| ")]
    heading, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


@pytest.mark.slow
def test_images_sweep_strengths_and_rates_side_by_side_and_continue(tmp_path):
    out = tmp_path / "compared"
    strong = [
        "--set",
        "ramda@strong.strength=0.1",
        "--set",
        "ramda@strong.learning_rates=1e-3,1e-2",
    ]
    options = [*IMAGES, "--stages", "2", "--recipes", "adamw,ramda,ramda@strong", *strong]
    options += ["--strength", "0.01", "--learning-rates", "1e-3,1e-2", "--set", "ramda.eps=1e-5"]
    code, said = invoke("compare", *options, "--seeds", "0", "--out", out)
    assert code == 0, said
    code, said = invoke("compare", *options, "--seeds", "0,1", "--resume", out)
    assert code == 0, said
    assert "seeds 0, 1" in (out / "comparison.md").read_text().splitlines()[0]
    rows = table(out)
    assert list(rows) == ["adamw", "ramda", "ramda@strong"]
    assert "strength" not in rows["adamw"]["settings"]
    assert "strength 0.01" in rows["ramda"]["settings"] and "eps 1e-05" in rows["ramda"]["settings"]
    assert "strength 0.1" in rows["ramda@strong"]["settings"]
    assert all(
        "±" in row["test error W"] and "(edge)" in row["learning rate"] for row in rows.values()
    )
    sparsity = {
        name: float(row["weighted group sparsity W"].split()[0]) for name, row in rows.items()
    }
    assert sparsity["ramda@strong"] > sparsity["ramda"] > sparsity["adamw"] == 0
    assert (out / "comparison.png").exists()
    (out / "frontier.png").unlink()
    code, again = invoke("compare", "--redraw", out)
    assert code == 0 and "| ramda@strong |" in again and (out / "frontier.png").exists()
    assert len(list(out.glob("ramda@strong-*-1/metrics.csv"))) == 1
    assert "Learning rate → test error W on the first seed" in (out / "comparison.md").read_text()


@pytest.mark.slow
def test_text_sweeps_and_continues(tmp_path):
    out, text = tmp_path / "compared", write_text(tmp_path / "text")
    sweep = ["--learning-rates", "1e-3,1e-2", "--set", "galore@keep.learning_rates=1e-2,1e15"]
    options = [*LM, *ADAM_AND_GALORE, "--text", text, *sweep, "--set", "galore@keep.transport=keep"]
    code, said = invoke("compare", *options, "--seeds", "0", "--out", out)
    assert code == 0, said
    assert "galore@keep-1e+15-0 diverged" in said
    killed = out / "adamw-0.001-0"  # before its first checkpoint
    for path in killed.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, said = invoke("compare", *options, "--seeds", "0,1", "--resume", out)
    assert code == 0, said
    rows = table(out)
    assert list(rows) == ["adamw", "galore@keep"]
    assert all("±" in row["held-out perplexity per byte"] for row in rows.values())
    assert rows["galore@keep"]["learning rate"] == "0.01 (edge)"
    assert rows["adamw"]["of adamw's"] == "1.00" and "keep" in rows["galore@keep"]["settings"]
    assert (out / "comparison.png").exists() and (out / "adamw-0.01-1" / "metrics.csv").exists()


@pytest.mark.slow
def test_bits_side_by_side(tmp_path):
    out, text = tmp_path / "compared", write_text(tmp_path / "text")
    sizes = [*TINY, "--width", "64", "--steps", "4", "--text", text]
    recipes = "adamw,adamw:8,galore:4@keep,q_galore"
    keep = ["--set", "galore:4@keep.transport=keep"]
    options = ["--task", "lm", *sizes, "--recipes", recipes, *keep, "--learning-rates", "1e-3"]
    code, said = invoke("compare", *options, "--seeds", "0,1", "--out", out)
    assert code == 0, said
    rows = table(out)
    assert list(rows) == recipes.split(",")
    settings = [row["settings"] for row in rows.values()]
    assert [x.endswith("8-bit state") for x in settings] == [False, True, False, True]
    assert settings[2].endswith("keep, 4-bit state")
    sizes = [int(row["state bytes"].replace(",", "")) for row in rows.values()]
    assert sizes[1] < 0.3 * sizes[0] and sizes[2] < sizes[3]
    assert (out / "adamw-8-0.001-1" / "metrics.csv").exists()


def test_all_recipes_and_every_strength_have_a_name():
    assert compare._names(LanguageModel, "all")[-1] == "apollo:8"
    assert {"muon", "galore", "optax_galore"} <= set(compare._names(LanguageModel, "all"))
    swept = {"learning_rates": None, "strengths": (1e-3, 1e-2)}
    own = ["adamw_pruned.strengths=0.5,0.8"]
    names = ["adamw", "ramda", "adamw_pruned"]
    tasks, rates = compare._tasks(Images, names, own, {"epochs": 10}, swept)
    pruned = ["adamw_pruned@0.5", "adamw_pruned@0.8"]
    assert list(tasks) == list(rates) == ["adamw", "ramda@0.001", "ramda@0.01", *pruned]
    assert tasks["ramda@0.01"].config.strength == 1e-2 and tasks["adamw"].config.strength == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipes", "ramda,sgd"], "unknown recipe 'sgd'"),
        (["--recipes", "ramda,fira"], "task images has no recipe 'fira': add --task lm"),
        (["--seeds", "a"], "--seeds takes whole numbers"),
        (["--strengths", "a"], "--strengths takes numbers"),
        (["--redraw", "none.json"], "none.json: no such file"),
        (["--set", "ramda.rate=1"], "expected RECIPE.NAME=VALUE"),
        (["--set", "ramda.eps=small"], "'small' is not a number"),
        (["--task", "lm", "--resume", "none"], "none holds no runs to continue: begin with --out"),
        (["--task", "lm", "--recipes", "galore,lamb"], "unknown recipe 'lamb'"),
        (["--task", "lm", "--recipes", "adamw:x"], "after the colon come the bits of the state"),
        (["--task", "lm", "--recipes", "adamw:7"], "state_bits must be one of 32, 8, 4, got 7"),
        (["--task", "lm", "--recipes", "adam:8"], "unknown recipe 'adam'"),
        (["--task", "lm", "--learning-rates", "a"], "--learning-rates takes numbers separated"),
        (["--task", "lm", "--set", "galore.rate=1"], "expected RECIPE.NAME=VALUE"),
        (["--task", "lm", "--set", "fira.rank=x"], "'x' is not a number"),
        (["--task", "lm", "--set", "fira.learning_rates=1"], "same number of learning rates"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = invoke("compare", *arguments)
    assert code == 2 and "Traceback" not in said
    assert said.startswith("error: ") and re.search(sentence, said), said
    assert not any(tmp_path.iterdir())
