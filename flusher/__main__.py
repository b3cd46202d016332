"""`python -m flusher`: Redis lists to TimescaleDB."""

from flusher.service import run
from sluice.lifecycle import run_service

if __name__ == "__main__":
    run_service("flusher", run, port=9103, needs_symbols=False)
