"""`python -m collector`: exchange sockets to Redis lists."""

from collector.service import run
from sluice.lifecycle import run_service

if __name__ == "__main__":
    run_service("collector", run, port=9101, needs_symbols=True)
