"""`python -m sluice.cli.configuration`: writes docs/configuration.md from the settings.

What a variable does is said once, in `.env.example`; what it accepts, once, in `Settings`.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sluice.settings import accepted

_HEAD = """\
# Configuration

Every process reads the environment, then `.env`. A bad value, or a name in `.env` that is nearly
one of these, is one line and exit code 2. Passwords may also come from files named after their
variable in `$CREDENTIALS_DIRECTORY` (systemd's LoadCredential). This page is made by
`python -m sluice.cli.configuration`.

| variable | what it does | accepted |
|---|---|---|
"""


def explained(example: str) -> Iterator[tuple[str, str]]:
    """Give name and explanation of every variable of an `.env.example`."""
    for comment, name in re.findall(r"^# (.+)\n#?([A-Z0-9_]+)=", example, re.MULTILINE):
        yield name, comment


def markdown(example: str) -> str:
    """Write the page."""
    rows = []
    for name, comment in explained(example):
        told = accepted(name).strip(" ()").removeprefix("accepted: ").replace("|", "\\|")
        rows.append(f"| `{name}` | {comment} | {told} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(markdown(Path(".env.example").read_text(encoding="utf-8")))
