"""What goes wrong: by seed and rate, or one at a time on command; counted when it really did.

A fault is *armed* (by a command, or drawn by its rate), *drawn* by the code that can inject it,
and *recorded* by that code once it was injected.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

MESSAGE = frozenset({
    # one data message, for every subscriber
    "drop", "duplicate", "reorder", "truncate", "bad_utf8", "wrong_type", "nan", "huge", "deep",
    "binary", "unknown_event", "extra_fields", "empty_frame",
})  # fmt: skip
LOSING = frozenset({"drop", "truncate", "bad_utf8", "wrong_type", "nan", "huge", "deep", "binary"})
CONNECTION = frozenset({
    # one open socket
    "cut", "cut_mid_frame", "close", "stall", "half_open", "slow", "shutdown",
})  # fmt: skip
HANDSHAKE = frozenset({"refuse_handshake", "acked_but_silent"})
CONTROL = frozenset({"ack_error", "ack_missing", "ack_late"})
REST = frozenset({
    # one REST request
    "rest_429", "rest_418", "rest_403", "rest_451", "rest_500", "rest_502", "rest_503", "rest_504",
    "rest_html", "rest_empty", "rest_truncated", "rest_stall", "rest_cut", "empty_page",
    "endless_page", "stale_snapshot",
})  # fmt: skip
STANDING = frozenset({"hide", "retire", "skew"})  # in force until changed, see `Exchange`
KINDS = MESSAGE | CONNECTION | HANDSHAKE | CONTROL | REST | STANDING


class UnknownFaultError(ValueError):
    """A fault was asked for that this simulator does not know."""


@dataclass(slots=True)
class Order:
    """A fault to inject `count` times into what `on` matches.

    `on` is a shell pattern: for messages and connections of a stream name (`btcusdt@trade`,
    `*@depth@100ms`), for REST of endpoint and symbol (`depth/BTCUSDT`, `historicalTrades/*`).
    `after` lets that many matches pass first. `options` are the fault's own (`code`, `seconds`,
    `bytes_per_second`).
    """

    kind: str
    count: int = 1
    on: str = "*"
    after: int = 0
    options: Mapping[str, float] = field(default_factory=dict)

    def fits(self, names: Iterable[str]) -> bool:
        """Whether what has these names is to be hit; `*` also hits what has none."""
        return self.on == "*" or any(fnmatchcase(name, self.on) for name in names)

    def number(self, name: str, default: float) -> float:
        """Read one option."""
        return float(self.options.get(name, default))


class Injection(NamedTuple):
    """A fault that really happened, at `time` (exchange time, milliseconds)."""

    time: int
    kind: str
    detail: Mapping[str, object]


class Faults:
    """The faults to come and those that happened.

    `rates` are probabilities: of a message fault per message, of a REST, control or handshake
    fault per request, of a connection fault per connection and second.
    """

    def __init__(
        self,
        seed: int = 1,
        rates: Mapping[str, float] | None = None,
        *,
        now: Callable[[], int],
        log: Callable[..., None],
    ) -> None:
        self.injected: list[Injection] = []
        self.counts: Counter[str] = Counter()
        self._now = now
        self._log = log
        self._orders: list[Order] = []
        self._rates: dict[str, float] = {}
        self._random = random.Random(seed)
        if rates:
            self.draw_at(rates, seed)

    @property
    def orders(self) -> list[Order]:
        """What was armed and has not been injected yet."""
        return list(self._orders)

    @property
    def is_armed(self) -> bool:
        """Whether anything can be drawn."""
        return bool(self._orders or self._rates)

    def arm(self, order: Order) -> None:
        """Inject on command.

        Raises:
            UnknownFaultError: No such kind.
        """
        _check(order.kind)
        self._orders.append(order)

    def draw_at(self, rates: Mapping[str, float], seed: int) -> None:
        """Inject by seed and rate from now on.

        Raises:
            UnknownFaultError: No such kind.
        """
        for kind in rates:
            _check(kind)
        self._rates = {kind: rate for kind, rate in sorted(rates.items()) if rate > 0}
        self._random.seed(seed)

    def quiet(self) -> None:
        """Forget what is armed and draw nothing more."""
        self._orders.clear()
        self._rates.clear()

    def draw(self, kinds: frozenset[str], *names: str) -> Order | None:
        """Give the fault to inject now into what has these names, if any, and count it off."""
        for order in self._orders:
            if order.kind in kinds and order.fits(names):
                if order.after:
                    order.after -= 1
                    continue
                order.count -= 1
                if order.count <= 0:
                    self._orders.remove(order)
                return Order(order.kind, 1, order.on, 0, order.options)
        for kind, rate in self._rates.items():
            if kind in kinds and self._random.random() < rate:
                return Order(kind)
        return None

    def record(self, kind: str, **detail: object) -> None:
        """Note that a fault was injected."""
        self.injected.append(Injection(self._now(), kind, detail))
        self.counts[kind] += 1
        self._log("fault", kind=kind, **detail)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise UnknownFaultError(f"unknown fault {kind!r}; there are {', '.join(sorted(KINDS))}")
