"""The command in this process, on runs as small as can be."""

import re

from typer.testing import CliRunner

from optax_structured.cli import app

IMAGES = ["--model", "logistic", "--epochs", "4", "--batch-size", "128"]
TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--sequence", "16", "--batch-size", "2"]
LM = ["--task", "lm", *TINY, "--steps", "12", "--evaluate-every", "4"]


def invoke(*arguments, columns=200):
    """Exit code and output, white space as single blanks."""
    runner = CliRunner(env={"COLUMNS": str(columns)})
    result = runner.invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def write_text(path):
    """A text of short paragraphs."""
    path.write_text(
        "\n\n".join(f"{i} bottles of beer on the wall, {i} bottles." for i in range(99))
    )
    return path
