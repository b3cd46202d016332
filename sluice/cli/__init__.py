"""The operator's command: one module a group of commands, registered here."""

import typer

from sluice.cli import database, dead, queues
from sluice.cli.audit import audit
from sluice.cli.backfill import backfill
from sluice.cli.doctor import doctor
from sluice.cli.gaps import gaps
from sluice.cli.install import install
from sluice.cli.maintain import maintain
from sluice.cli.markets import book, markets, top
from sluice.cli.record import record
from sluice.cli.replay import replay
from sluice.cli.run import run, stop
from sluice.cli.sizes import sizes
from sluice.cli.status import status

app = typer.Typer(
    name="sluice",
    help="Records crypto markets into TimescaleDB without losing anything, and can prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print the values of variables, passwords too
)
for command in (
    *(run, stop, status, doctor),
    *(markets, top, book),
    *(gaps, audit, backfill),
    *(record, replay),
    *(install, maintain),
):
    app.command()(command)
database.app.command("sizes")(sizes)
app.add_typer(database.app, name="db")
app.add_typer(queues.app, name="queues")
app.add_typer(dead.app, name="dead")


def main() -> None:
    """Run the command line."""
    app()
