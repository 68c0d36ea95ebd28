"""`optax-structured train`: one run of any task."""

import pathlib
from typing import Annotated, Any

import typer
from rich.markup import escape

from optax_structured.cli import common, options
from optax_structured.cli.common import option
from optax_structured.cli.compact import FOLDER, write
from optax_structured.planning import parse_mesh
from optax_structured.training import devices, run
from optax_structured.training.folder import check_empty, quoted
from optax_structured.training.tasks import TASKS

_RECIPES = " ".join(f"For {task.name} {', '.join(task.recipes)}." for task in TASKS.values())


@options.of_tasks()
def train(
    task: options.TaskName = None,
    recipe: Annotated[str | None, option(_RECIPES)] = None,
    out: options.Out = None,
    resume: Annotated[
        pathlib.Path | None,
        option("Continue the run in this folder, bit for bit; more --epochs or --steps extend it."),
    ] = None,
    stop_after: Annotated[
        int | None,
        option("Leave after this many epochs (images) or steps (lm) in all, to be resumed."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, with its table of rules.")
    ] = False,
    smaller: Annotated[
        bool, typer.Option("--compact", help="At the end cut everything dead from the network.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    mesh: Annotated[
        str | None, option("Spread the run over these devices, as data=4,fsdp=2 (lm).")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Join the other processes of the run first.")
    ] = False,
    **given: Any,
) -> None:
    """Train a network on real images or text with one recipe, and write a run folder."""
    with common.sentences(quiet) as console:
        common.check_one_folder(resume, out)
        sizes = parse_mesh(mesh)
        if distributed:
            devices.join()
            console.quiet |= not devices.is_first()
        if resume:
            task = options.stored_task(resume, task)
        kind, chosen = options.task_of(task, [recipe] if recipe else [], given)
        if recipe:
            chosen["recipe"] = recipe
        one = run.stored(kind, resume, chosen, sizes) if resume else run.new(kind, chosen, sizes)
        if dry_run:
            run.announce(one, console)
            console.print(escape(run.table_of_rules(one)), soft_wrap=True)
            return
        folder = resume or out or pathlib.Path("runs") / run.default_name(one)
        if not resume:
            check_empty(folder)
        with common.interrupts(console) as stopped:
            run.announce(one, console)
            result = run.run(
                one, folder, console, resume=bool(resume), stop_after=stop_after, stopped=stopped
            )
            if any(devices.in_any_process(stopped())):
                console.print(f"Saved at step {result.step} of {one.total_steps}.")
                common.leave(console, f"optax-structured train --resume {quoted(folder)}")
            if result.began == result.step:
                total = f"{one.length} {one.unit}s"
                console.print(
                    f"This run is finished: it has its {total}; more --{one.unit}s extend it"
                    if result.step == one.total_steps
                    else f"This run has {result.step // one.steps_a_unit} of its {total} already"
                )
            if devices.is_first():
                run.describe(one, result, folder, console)
                if smaller and result.step == one.total_steps:
                    write(one, folder, folder / FOLDER, console)
        console.print(escape(f"Written to {folder}"))
