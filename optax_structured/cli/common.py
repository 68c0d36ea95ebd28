"""What the subcommands share: errors as sentences, lists of numbers, words of help."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from optax_structured import __version__
from optax_structured.training.interrupts import LEFT, Interrupts

Number = TypeVar("Number", int, float)


@contextlib.contextmanager
def sentences(quiet: bool = False) -> Iterator[Console]:
    """Says what the user can mend in one sentence; anything else keeps its traceback."""
    console = Console(highlight=False, quiet=quiet)
    try:
        yield console
    except (ValueError, OSError, FloatingPointError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            said = f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
        stderr = Console(stderr=True, highlight=False)
        stderr.print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True)
        raise typer.Exit(2) from error


def interrupts(console: Console) -> Interrupts:
    """Ctrl-C saves and leaves, and again leaves at once; a context."""

    def leave_at_once() -> None:
        console.show_cursor(True)

    said = "\nStopping as soon as this step is saved; Ctrl-C again leaves at once."
    return Interrupts(lambda: console.print(said), leave_at_once)


def leave(console: Console, how: str) -> NoReturn:
    """Ends the command after Ctrl-C, with what continues it."""
    console.print(escape(f"Continue with {how}"), soft_wrap=True)
    raise typer.Exit(LEFT)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"optax-structured {__version__}")
        raise typer.Exit


def show_version(
    version: Annotated[
        bool, typer.Option("--version", help="Show it.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options of the command itself."""


def check_one_folder(resume: pathlib.Path | None, out: pathlib.Path | None) -> None:
    """Raises ValueError if there are two folders to write to."""
    if resume and out:
        raise ValueError("what is resumed stays in its folder: give --resume or --out, not both")


def option(text: str, *names: str, panel: str | None = None) -> Any:
    """An option that is None unless given, so that a resumed run can be checked against it."""
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(
    given_as: str, text: str | None, kind: Callable[[str], Number]
) -> tuple[Number, ...] | None:
    """Numbers separated by commas, of the kind int or float; None where the option is not given."""
    if text is None:
        return None
    try:
        return tuple(kind(number) for number in names(text))
    except ValueError:
        word = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{given_as} takes {word} separated by commas, got {text!r}") from None


def own_settings(
    settings: Sequence[str], recipes: Sequence[str], kinds: Mapping[str, Callable[[str], Any]]
) -> dict[str, dict[str, Any]]:
    """`RECIPE.NAME=VALUE` as a dictionary per recipe; `kinds` reads the value of a NAME."""
    own: dict[str, dict[str, Any]] = {name: {} for name in recipes}
    for setting in settings:
        target, _, value = setting.partition("=")
        name, _, field = target.partition(".")
        if name not in own or field not in kinds:
            raise ValueError(
                f"--set {setting}: expected RECIPE.NAME=VALUE with a recipe of "
                f"{', '.join(recipes)} and a name of {', '.join(kinds)}"
            )
        try:
            own[name][field] = kinds[field](value)
        except ValueError:
            raise ValueError(f"--set {setting}: {value!r} is not a number") from None
    return own
