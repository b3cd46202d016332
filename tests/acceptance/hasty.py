"""A service without patience: what it does after a minute, it does after a second or two.

`python -m tests.acceptance.hasty collector` is `python -m collector`, so that a test can wait for
what only a long silence brings. Nothing else of the process differs.
"""

import runpy
import sys

from collector import anchors, backfill, candles, liveness, polling
from sluice import publisher, stream

PATIENCE = (
    (anchors, "ORPHANS_SECONDS", 0.5),
    (backfill, "LEASE_MS", 2000),
    (backfill, "RETRY_SECONDS", 0.2),
    (liveness, "LEAST_SILENCE_SECONDS", 2.0),
    (liveness, "MOST_SILENCE_SECONDS", 2.0),
    (candles, "LEASE_MS", 2000),
    (polling, "AFTER_SECONDS", 1.0),
    (polling, "ROUND_SECONDS", 0.3),
    (publisher, "CHECK_SECONDS", 0.3),
    (stream, "LEAST_SILENCE_SECONDS", 1.0),
    (stream, "MOST_SILENCE_SECONDS", 1.0),
    (stream, "WATCH_SECONDS", 0.5),
    # A second channel is then subscribed to by message.
    (stream, "CHANNELS_IN_PATH", 1),
)


def main() -> None:
    for module, name, value in PATIENCE:
        setattr(module, name, value)
    runpy.run_module(sys.argv.pop(1), run_name="__main__")


if __name__ == "__main__":
    main()
