"""`python -m collector`: exchange sockets to Redis lists."""

from sluice.signals import end_cleanly_when_told

end_cleanly_when_told()  # before what takes a second to import

from collector.service import run  # noqa: E402  # see above
from sluice.lifecycle import run_service  # noqa: E402  # see above

if __name__ == "__main__":
    run_service("collector", run, port=9101, needs_symbols=True)
