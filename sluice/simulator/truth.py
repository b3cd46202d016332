"""What really happened, for whoever checks a client: published, withheld, hidden, injected."""

from collections.abc import Iterable, Mapping
from itertools import islice

from sluice.simulator.exchange import Exchange, Request
from sluice.simulator.faults import Injection
from sluice.simulator.tape import Levels, Trade


class Truth:
    """Answers from the tapes; ids are raw trade ids."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def symbols(self) -> list[str]:
        """Every symbol that is listed."""
        return list(self._exchange.tapes)

    @property
    def faults(self) -> list[Injection]:
        """Every fault that was injected, in order."""
        return list(self._exchange.faults.injected)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each fault was injected."""
        return dict(self._exchange.faults.counts)

    @property
    def requests(self) -> list[Request]:
        """The REST requests that were answered, the last 10,000."""
        return list(self._exchange.requests)

    def ids(self, symbol: str) -> tuple[int, int] | None:
        """First and last published id, both included; every id between was published."""
        trades = self._exchange.tapes[symbol].trades
        if trades.first_id is None or trades.last_id is None:
            return None
        return trades.first_id, trades.last_id

    def count(self, symbol: str) -> int:
        """How many trades were published."""
        return len(self._exchange.tapes[symbol].trades)

    def trade(self, symbol: str, trade_id: int) -> Trade | None:
        """All fields of one trade."""
        return self._exchange.tapes[symbol].trades.get(trade_id)

    def trades(self, symbol: str, from_id: int = 0, limit: int | None = None) -> list[Trade]:
        """All fields of the trades from an id on, ascending."""
        return list(islice(self._exchange.tapes[symbol].trades.since(from_id), limit))

    def withheld(self, symbol: str) -> list[int]:
        """Ids that the sockets were not given, though somebody was subscribed."""
        return sorted(self._exchange.hub.withheld.get(symbol, ()))

    def hidden(self, symbol: str) -> list[int]:
        """Ids that REST does not serve."""
        return sorted(self._exchange.hidden.get(symbol, ()))

    def retired(self, symbol: str) -> list[int]:
        """Ids that REST serves within aggregates only."""
        return sorted(self._exchange.retired.get(symbol, ()))

    def update_id(self, symbol: str) -> int:
        """The newest update id of the book."""
        return self._exchange.tapes[symbol].book.update_id

    def book(self, symbol: str, update_id: int | None = None) -> Levels | None:
        """The exact book at an update id, or now; None where it is no longer remembered.

        A recording changes the book a diff at a time: the book is then the one of the last diff
        up to the id, and says so in its own `update_id`.
        """
        book = self._exchange.tapes[symbol].book
        return book.at(book.update_id if update_id is None else update_id)


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Print ascending ids as ranges, both ends included."""
    found: list[tuple[int, int]] = []
    for number in ids:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
