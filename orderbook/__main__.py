"""`python -m orderbook`: book changes and images to snapshot rows and latest books."""

from orderbook.service import run
from sluice.lifecycle import run_service

if __name__ == "__main__":
    run_service("orderbook", run, port=9102, needs_symbols=True)
