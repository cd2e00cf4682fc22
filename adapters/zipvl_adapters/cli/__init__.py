"""The command line: `zipvl demo`, `zipvl run`, `zipvl eval`, `zipvl bench`, `zipvl tune`, `zipvl env`.

Importing this package loads neither torch nor transformers nor matplotlib: the commands do so when they run.
"""

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zipvl_adapters.cli import bench, demo, env, evaluate, run, tune
from zipvl_adapters.cli.checks import UserError

__all__ = ["app", "main"]

BAD_INPUT, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _fail(message: object, code: int) -> None:
    print(f"zipvl: {_one_line(message)}", file=sys.stderr)
    sys.exit(code)


class _Commands(TyperGroup):
    """Turns whatever a command raises into one line on stderr and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = args[0] if args else extra.pop("args", None)
        arguments = list(sys.argv[1:] if given is None else given)
        debug = "--debug" in arguments
        if debug:  # so that it may also stand behind the command
            arguments.remove("--debug")
        try:
            code = super().main(arguments, **{**extra, "standalone_mode": False})
        except UserError as error:
            _fail(error, BAD_INPUT)
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(INTERRUPTED)
        except Exception as error:
            if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing value
                _fail(f"{error.format_message().rstrip('.')}. Try 'zipvl --help' or 'zipvl COMMAND --help'.", BAD_INPUT)
            if debug:
                traceback.print_exc()
                sys.exit(INTERNAL_ERROR)
            kind = type(error).__name__
            _fail(
                f"unexpected {kind}: {error} (for a bug report: the same command with --debug, and 'zipvl env')",
                INTERNAL_ERROR,
            )
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="zipvl",
    cls=_Commands,
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(demo.demo)
app.command()(run.run)
app.command("eval")(evaluate.evaluate)
app.command()(bench.bench)
app.command()(tune.tune)
app.command()(env.env)


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """ZipVL: vision-language models that keep only the tokens that matter."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `zipvl` command. Exit codes: 0 done, 1 internal error, 2 bad input, 130 interrupted."""
    app()
