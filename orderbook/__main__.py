"""`python -m orderbook`: book changes and images to snapshot rows and latest books."""

from sluice.signals import end_cleanly_when_told

end_cleanly_when_told()  # before what takes a second to import

from orderbook.service import run  # noqa: E402  # see above
from sluice.lifecycle import run_service  # noqa: E402  # see above

if __name__ == "__main__":
    run_service("orderbook", run, port=9102, needs_symbols=True)
