"""`python -m flusher`: Redis lists to TimescaleDB."""

import gc

from flusher.service import run
from sluice.lifecycle import run_service

if __name__ == "__main__":
    # A batch is some ten thousand tuples that live for a moment, none in a circle: by default the
    # collector would walk through them every 700, at a seventh of the CPU.
    gc.freeze()
    gc.set_threshold(100_000)
    run_service("flusher", run, port=9103, needs_symbols=False)
