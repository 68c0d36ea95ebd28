"""The command `optax-structured`: one module a subcommand."""

try:
    import typer

    from optax_structured.cli.common import show_version
    from optax_structured.cli.compact import compact
    from optax_structured.cli.compare import compare
    from optax_structured.cli.inspect import inspect
    from optax_structured.cli.plan import plan
    from optax_structured.cli.report import report
    from optax_structured.cli.train import train
except ModuleNotFoundError as error:
    raise SystemExit(
        f"the command needs {error.name}: pip install 'optax-structured[train]'"
    ) from error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train networks that end up exactly structured, or with little optimizer memory.",
)
app.callback()(show_version)
for command in (train, compare, compact, inspect, plan, report):
    app.command()(command)
