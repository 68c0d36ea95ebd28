"""`optax-structured train`, from the options to the files."""

import re

import numpy as np
import pytest
from cli_runs import IMAGES, LM, TINY, invoke, write_text

import optax_structured as oxs
from optax_structured.cli import app

EVERY_RUN = {"config.json", "metrics.csv", "losses.npy", "training.png", "checkpoints"}
FILES = {
    "images": EVERY_RUN | {"layers.png", "strips.npz"},
    "lm": EVERY_RUN | {"leaves.png", "leaves.csv", "state.csv"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "short.txt")


def check_folder(run, task, steps, evaluations):
    assert {path.name for path in run.iterdir()} == FILES[task]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + evaluations
    assert len(np.load(run / "losses.npy")) == steps


@pytest.mark.slow
def test_images_write_a_run_folder_and_resume(tmp_path):
    run = tmp_path / "run"
    code, said = invoke("train", *IMAGES, "--stages", 2, "--out", run, "--stop-after", 2)
    assert code == 0, said
    code, said = invoke("train", "--resume", run, "--epochs", 4, columns=60)
    assert code == 0, said
    assert "Dense_0/kernel" in said and "distance to stationarity" in said
    assert re.search(r"the dual norm of the gradient of Dense_0/kernel, the smallest", said)
    check_folder(run, "images", 4 * 11, 4)
    code, said = invoke("train", "--resume", run)
    assert code == 0 and "finished: it has its 4 epochs; more --epochs extend it" in said
    code, said = invoke("train", "--resume", run, "--epochs", 5)
    assert code == 0, said
    check_folder(run, "images", 5 * 11, 5)


@pytest.mark.slow
def test_a_text_run_writes_a_run_folder_and_resumes(tmp_path, text):
    run = tmp_path / "run"
    options = [*LM, "--recipe", "galore", "--rank", 4, "--period", 5, "--text", text]
    code, said = invoke("train", *options, "--out", run, "--stop-after", 3)
    assert code == 0, said
    code, said = invoke("train", "--resume", run, "--stop-after", 3)
    assert code == 0 and "has 3 of its 12 steps already" in said
    code, said = invoke(
        *("train", "--resume", run, "--recipe", "galore", "--rank", "4"), columns=60
    )
    assert code == 0, said
    assert re.search(r"galore 0 .*100% loss", said)  # the live line begins with what is running
    assert "block_0/attention/query/kernel" in said and "held-out perplexity per byte" in said
    check_folder(run, "lm", 12, 3)
    (line,) = (x for x in (run / "state.csv").read_text().splitlines() if "query" in x)
    *described, state_bytes, code_bytes = line.split(",")
    assert described == ["block_0/attention/query/kernel", "16×16", "default", "4", "1024"]
    assert 4 * (3 * 4 * 16) <= int(state_bytes) < 2 * 1024 and code_bytes == "0"


@pytest.mark.slow
def test_state_bits_are_said_and_stored(tmp_path, text):
    run = tmp_path / "run"
    sizes = [*TINY, "--width", "64", "--steps", "4", "--text", text]
    options = ["--task", "lm", *sizes, "--recipe", "adamw", "--state-bits", "8"]
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "speech"], "unknown task 'speech': choose one of images, lm"),
        (["--recipe", "rambda"], "unknown recipe 'rambda': .* did you mean 'ramda'?"),
        (["--recipe", "galore"], "task images has no recipe 'galore': add --task lm, or choose"),
        (["--task", "lm", "--recipe", "ramda"], "lm has no recipe 'ramda': add --task images, or"),
        (["--task", "lm", "--recipe", "galor"], "unknown recipe 'galor': .* mean 'galore'"),
        (["--data", "fashion-mnist", "--data-dir", "none"], "dataset-fashion-mnist"),
        (["--model", "lenet"], "use --model conv"),
        (["--learning-rate", "-1"], "learning_rate must be"),
        (["--milestones", "2;3"], "--milestones takes whole numbers .* got '2;3'"),
        (["--resume", "none"], "none is not a run folder"),
        (["--resume", "a", "--out", "b"], "not both"),
        (["--rank", "4"], "--rank has no meaning for the task images; leave it out"),
        (["--task", "lm", "--strength", "1"], "--strength has no meaning for the task lm"),
        (["--task", "lm", "--text", "no.txt"], "no text file no.txt"),
        (["--task", "lm", "--recipe", "adamw", "--rank", "4"], "has no rank; leave --rank out"),
        (["--task", "lm", "--sequence", "1000000"], "longer than the .* bytes of the training"),
        (["--task", "lm", "--rank", "0"], "rank must be a whole number of at least 1, got 0"),
        (
            ["--task", "lm", "--rank", "1000"],
            "no leaf can be projected; .*numbers of state, plain A",
        ),
        (["--task", "lm", "--state-bits", "16"], "state_bits must be one of 32, 8, 4, got 16"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = invoke("train", *arguments)
    assert code == 2 and "Traceback" not in said
    assert said.startswith("error: ") and re.search(sentence, said), said
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    mine = tmp_path / "my runs"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    for command in ("train", "compare"):
        code, said = invoke(command, *IMAGES, "--out", mine)
        assert code == 2 and "is not empty" in said and f"--resume '{mine}'" in said
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_task_and_text(tmp_path, text):
    run = tmp_path / "run"
    options = [*LM, "--recipe", "adamw", "--out", run, "--stop-after", 1]
    code, said = invoke("train", *options, "--text", text)
    assert code == 0, said
    other = tmp_path / "other.txt"
    other.write_text("another\n\ntext\n\n" * 9)
    for more, sentence in (
        (["--task", "images"], "holds a run of the task lm, not images"),
        (["--text", other], "are not the data of the run in .*: give them with --text"),
        (["--seed", "4"], "seed is 0 there and 4 here"),
    ):
        code, said = invoke("train", "--resume", run, *more)
        assert code == 2 and re.search(sentence, said), said
    moved = text.rename(tmp_path / "moved.txt")
    try:
        code, said = invoke("train", "--resume", run, "--text", moved, "--stop-after", 2)
        assert code == 0, said
    finally:
        moved.rename(text)
    code, said = invoke("compare", "--resume", tmp_path, "--task", "images")
    assert code == 2 and "holds a run of the task lm, not images" in said
    code, said = invoke("compare", "--resume", tmp_path, "--strength", "1")  # it knows the task
    assert code == 2 and "--strength has no meaning for the task lm" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["plan", "--params-json", "nowhere.json"],
            "error: nowhere.json: no such file or directory ",
        ),
        (["plan", "--params-json", "folder"], "error: folder: is a directory "),
        (
            ["plan", "--params-json", "codes"],
            "error: codes is not JSON: 'utf-8' codec can't decode",
        ),
        (["train", "--out", "codes/run", *IMAGES], "error: codes/run: not a directory "),
        (
            ["train", "--resume", "codes"],
            "error: codes is not a run folder: it has no config.json ",
        ),
        (["train", "--resume", "folder"], "error: folder/config.json is not the configuration"),
        (["train", "--task", "lm", "--text", "folder"], "error: there is no text file folder;"),
        (["compare", "--resume", "my folder"], "begin with --out 'my folder'"),
    ],
)
def test_bad_paths_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("codes", "folder/config.json"):
        (tmp_path / path).write_bytes(b"\xff\xfe")
    code, said = invoke(*arguments)
    assert code == 2 and sentence in said and "Errno" not in said, said


def test_help_names_the_choices_by_task():
    code, said = invoke("train", "--help")
    assert code == 0 and "--recipe" in said and "prox_ssi" in said
    images, lm = said.index("Task images"), said.index("Task lm")
    assert (
        said.index("--seed")
        < images
        < said.index("Passes over the images; default 100.")
        < lm
        < said.index("--width")
    )
    assert "Of the residual stream; default 128." in said


@pytest.mark.parametrize("columns", [60, 80])
def test_help_cuts_no_word(columns):
    for command in app.registered_commands:
        code, said = invoke(command.callback.__name__, "--help", columns=columns)
        assert code == 0 and "…" not in said, said


def test_the_version_is_said():
    assert invoke("--version") == (0, f"optax-structured {oxs.__version__} ")


@pytest.mark.slow
def test_a_dry_run_shows_the_rules_and_writes_nothing(tmp_path):
    code, said = invoke("train", *IMAGES, "--dry-run", "--out", tmp_path / "run")
    assert code == 0 and "Dense_0/kernel" in said and "GroupLasso(group_axis=-2" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_quiet_prints_errors_only(tmp_path):
    assert invoke("train", *IMAGES, "--dry-run", "--quiet") == (0, "")
    code, said = invoke("train", "--quiet", "--recipe", "rmad")
    assert code == 2 and "did you mean 'rmda'" in said


@pytest.mark.slow
def test_a_run_on_a_mesh_has_the_numbers_of_one_device(tmp_path, text):
    options = [*LM, "--batch-size", 8, "--recipe", "galore", "--rank", 4, "--text", text]
    for name, mesh in {"one": [], "mesh": ["--mesh", "data=4,fsdp=2"]}.items():
        code, said = invoke("train", *options, *mesh, "--out", tmp_path / name)
        assert code == 0, said
    one, other = (np.load(tmp_path / name / "losses.npy") for name in ("one", "mesh"))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_meshes_that_cannot_be_speak(text):
    options = ["--text", text, "--batch-size", 2]
    for given, sentence in {
        ("--mesh", "fsdp=3"): "--mesh fsdp=3 has 3 devices, and this run has 8 in 1 processes",
        ("--mesh", "eight"): "--mesh takes NAME=SIZE,..., such as fsdp=8, got 'eight'",
        ("--mesh", "data=8"): "batch_size 2 must be a multiple of the 8 devices of the mesh",
    }.items():
        code, said = invoke("train", *LM, *options, *given)
        assert code == 2 and sentence in said, said
    code, said = invoke("train", "--mesh", "data=8")
    assert code == 2 and "--mesh has no meaning for the task images" in said
