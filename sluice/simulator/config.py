"""What a simulated exchange can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "NEXOUSDT")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorConfig:
    """Settings of a simulator; times are in seconds, and shorter ones scale the exchange's rules.

    Attributes:
        symbols: The synthetic markets; unused with `recordings`.
        seed: Decides every order of the synthetic markets.
        rate: Trades a second of all synthetic markets together, up to about 5,000.
        recordings: Files of a recording (`<timestamp> <raw JSON>` lines, gzip or plain) to play
            instead; files that continue each other may be given in any order.
        speed: Of a recording: 1 is real time, 10 ten times that, 0 as fast as the readers take it.
        start_when: Streams that must be subscribed before anything is published; a recording
            further waits for a snapshot of each `@depth` stream among them.
        is_paused: Do not start before `/control/source` says so.
        state: Where ids are kept, so that a simulator started again goes on counting.
        log: A JSON-lines log of connections, requests and faults.
        are_errors_nested: `{"error":{..},"id":..}` as seen, or flat as printed.
        are_unknown_symbols_refused: Answer a subscription to an unknown symbol with an error and
            a close, as once seen, instead of an ack and silence.
        lifetime: Of a connection, 24 h.
        shutdown_notice: How long before its end a connection hears `serverShutdown`; 0 is never.
        max_buffered: Bytes a connection may have unsent before it is closed with 1008.
    """

    symbols: tuple[str, ...] = DEFAULT_SYMBOLS
    seed: int = 1
    rate: float = 12.0
    recordings: tuple[Path, ...] = ()
    speed: float = 1.0
    start_when: tuple[str, ...] = ()
    is_paused: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    state: Path | None = None
    log: Path | None = None
    fault_rates: Mapping[str, float] = field(default_factory=dict)
    fault_seed: int = 1
    are_errors_nested: bool = True
    are_unknown_symbols_refused: bool = False
    ping_interval: float = 20.0
    pong_timeout: float = 60.0
    lifetime: float = 86_400.0
    shutdown_notice: float = 0.0
    messages_per_second: int = 5
    max_streams: int = 1024
    max_connects: int = 300
    connect_window: float = 300.0
    max_buffered: int = 64 << 20
    max_weight: int = 6_000
    weight_window: float = 60.0
    refusals_before_ban: int = 10
    ban: float = 120.0
