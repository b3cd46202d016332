"""`python -m sluice.cli.commands`: writes docs/commands.md from the commands themselves."""

import inspect
import sys
from collections.abc import Iterator

import typer
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.main import get_command

from sluice.cli import app

_HEAD = """\
# Commands

`sluice COMMAND --help` says the same. Every command reads its settings from the environment, then
`.env`. With `--json` a command prints JSON on standard output and nothing else there.

| exit code | meaning |
|---|---|
| 0 | done, and nothing is wrong with what was looked at |
| 1 | something needs a person: unexplained, refused, not sound, or not done to the end |
| 2 | a bad setting, a bad argument, or a file that is not what it should be |
| 3 | a server can not be reached |

Completion of commands and options: `sluice --install-completion` for the shell at hand (bash, zsh,
fish, PowerShell), or `sluice --show-completion` to put it where you like.

This page is made by `python -m sluice.cli.commands`.
"""


def markdown() -> str:
    """Write the page."""
    context = typer.Context(get_command(app), info_name="sluice")
    return _HEAD + "".join(_sections(context))


def _sections(context: typer.Context) -> Iterator[str]:
    """Write a section for each command below a group, in the order in which help lists them."""
    group = context.command
    assert isinstance(group, TyperGroup)  # noqa: S101  # called with groups only
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None  # noqa: S101  # it was listed
        below = typer.Context(command, info_name=name, parent=context)
        yield f"\n## {_usage(below)}\n\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        rows = [row for parameter in command.params if (row := _row(parameter))]
        if rows:
            yield "\n| argument | what it is |\n|---|---|\n" + "".join(rows)
        if isinstance(command, TyperGroup):
            yield from _sections(below)


def _usage(context: typer.Context) -> str:
    arguments = [p for p in context.command.params if isinstance(p, TyperArgument)]
    names = [f"{_metavar(p)}" if p.required else f"[{_metavar(p)}]" for p in arguments]
    return " ".join([context.command_path, *names])


def _metavar(argument: TyperArgument) -> str:
    name = argument.metavar or str(argument.name).upper()
    return f"{name}..." if argument.nargs == -1 and not name.endswith("...") else name


def _row(parameter: object) -> str:
    if isinstance(parameter, TyperArgument):
        name = _metavar(parameter)
    elif isinstance(parameter, TyperOption):
        name = " ".join([*parameter.opts, *parameter.secondary_opts])
    else:
        return ""
    value = parameter.default
    # Where this is installed is not what it is elsewhere.
    is_told = isinstance(value, int | float | str) and not isinstance(value, bool)
    default = f" Default: {value}." if is_told and not str(value).startswith("/") else ""
    text = f"{parameter.help or ''}{default}".strip().replace("|", "\\|")
    return f"| `{name}` | {text} |\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
