"""`python -m flusher`: Redis lists to TimescaleDB."""

import gc

from sluice.signals import end_cleanly_when_told

end_cleanly_when_told()  # before what takes a second to import

from flusher.service import run  # noqa: E402  # see above
from sluice.lifecycle import run_service  # noqa: E402  # see above

if __name__ == "__main__":
    # A batch is some ten thousand tuples that live for a moment, none in a circle: by default the
    # collector would walk through them every 700, at a seventh of the CPU.
    gc.freeze()
    gc.set_threshold(100_000)
    run_service("flusher", run, port=9103, needs_symbols=False)
