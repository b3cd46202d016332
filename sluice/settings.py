"""The settings of every process, from the environment and `.env` alone.

A bad value, or a name in `.env` that is nearly one of ours, is one readable line and exit code 2.
Every variable stands in `.env.example` with a line on what it does.
"""

import datetime as dt
import difflib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, get_args, get_origin

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sluice.exchanges import EXCHANGES

HYPERTABLES: Final = ("trades", "orderbook_snapshots", "klines", "tickers")
"""The tables that are kept in chunks of time."""
LEAST_TRADE_DAYS: Final = 2
"""For how long trades must be kept, so that their candles are made before they are dropped."""

ENV_FILE: Final = ".env"
EXIT_BAD_SETTINGS: Final = 2


@dataclass(frozen=True, slots=True, order=True)
class Market:
    """One market of one exchange, written `binance:BTCUSDT`."""

    exchange: str
    symbol: str

    def __str__(self) -> str:
        return f"{self.exchange}:{self.symbol}"


def parse_market(text: str) -> Market:
    """Read `exchange:SYMBOL`; a bare symbol is Binance's.

    Raises:
        ValueError: no such exchange, or no symbol of its form.
    """
    name, colon, symbol = text.strip().partition(":")
    if not colon:
        name, symbol = "binance", name
    exchange = EXCHANGES.get(name)
    if exchange is None:
        raise ValueError(f"{text!r}: no exchange {name!r}; there are {', '.join(EXCHANGES)}")
    if not exchange.symbol_pattern.fullmatch(symbol):
        raise ValueError(
            f"{text!r}: a symbol of {name} looks like {exchange.symbol_pattern.pattern}"
        )
    return Market(name, symbol)


def _split(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


CommaSeparated = Annotated[list[str], NoDecode, BeforeValidator(_split)]
_is_proxy_url = re.compile(r"(?:https?|socks[45])://(?:[^/\s@]+@)?[^/\s@]+:\d+/?").fullmatch
_is_period = re.compile(r"([1-9]\d{0,4})([hd])").fullmatch


def _by_table(value: object) -> object:
    """Read `12` for every table, or `trades=12,klines=30`, or both, the named ones first."""
    if not isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        table, equals, text = (word.strip() for word in part.partition("="))
        if not equals:
            named = dict.fromkeys(HYPERTABLES, table) | named
        elif table in HYPERTABLES:
            named[table] = text
        else:
            raise ValueError(f"there is no table {table!r}; there are {', '.join(HYPERTABLES)}")
    return named


def _period(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not (found := _is_period(value)):
        raise ValueError(f"{value!r} is no period such as 6h or 1d")
    number, unit = found.groups()
    return timedelta(hours=int(number) * (24 if unit == "d" else 1))


Period = Annotated[timedelta, BeforeValidator(_period)]
PeriodByTable = Annotated[dict[str, Period], NoDecode, BeforeValidator(_by_table)]
Days = Annotated[int, Field(ge=1, le=36_500)]
DaysByTable = Annotated[dict[str, Days], NoDecode, BeforeValidator(_by_table)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _base_url(scheme: str) -> AfterValidator:
    """Accept a base address: scheme, host and port; a path is ours to add, a password nobody's."""
    is_base = re.compile(rf"{scheme}s?://[^/\s?#@]+/?").fullmatch

    def check(value: str) -> str:
        if not is_base(value):
            raise ValueError(f"a base looks like {scheme}s://host:port, without a path")
        return value

    return AfterValidator(check)


SocketUrl = Annotated[str, _base_url("ws")]
RestUrl = Annotated[str, _base_url("http")]


class Settings(BaseSettings):
    """All settings; each field is the variable of the same name in capitals."""

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        regex_engine="python-re",  # the other one has no \Z
    )

    redis_host: str = "127.0.0.1"
    redis_port: Port = 6379
    redis_username: str = ""
    redis_password: SecretStr | None = None
    redis_db: Annotated[int, Field(ge=0)] = 0
    redis_tls: bool = False

    postgres_host: str = "127.0.0.1"
    postgres_port: Port = 5432
    postgres_db: str = "sluice"
    postgres_user: str = "sluice"
    postgres_password: SecretStr | None = None
    postgres_sslmode: Literal[
        "disable", "allow", "prefer", "require", "verify-ca", "verify-full"
    ] = "prefer"

    symbols: CommaSeparated = []
    streams: CommaSeparated = ["trade"]

    binance_spot_ws_url: SocketUrl = "wss://stream.binance.com:9443"
    binance_spot_rest_url: RestUrl = "https://api.binance.com"
    simulator_ws_url: SocketUrl = "ws://127.0.0.1:8700"
    simulator_rest_url: RestUrl = "http://127.0.0.1:8700"
    proxy_url: SecretStr | None = None

    flush_batch_size: Annotated[int, Field(ge=1, le=100_000)] = 5000
    flush_batch_bytes: Annotated[int, Field(ge=1024, le=256 * 2**20)] = 8 * 2**20
    flush_interval_ms: Annotated[int, Field(ge=1, le=600_000)] = 1000
    dead_max: Annotated[int, Field(ge=0)] = 10_000
    queue_shards: Annotated[int, Field(ge=1, le=64)] = 1

    chunk_interval: PeriodByTable = {}
    columnstore_after_days: Days = 7
    retention_days: DaysByTable = {}

    snapshot_depth: Annotated[int, Field(ge=1, le=5000)] = 20
    snapshot_interval_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 1000
    publish_depth: Annotated[int, Field(ge=1, le=400)] = 20
    publish_live: bool = False
    book_depth: Annotated[int, Field(ge=100, le=5000)] = 5000
    book_shard: Annotated[str, Field(pattern=r"^\d{1,4}/\d{1,4}\Z")] = "0/1"
    book_max_mb: Annotated[int, Field(ge=1)] = 1024
    book_idle_minutes: Annotated[float, Field(ge=0)] = 60.0
    book_audit_seconds: Annotated[float, Field(ge=0)] = 60.0

    queue_max_mb: Annotated[int, Field(ge=1)] = 1024
    spool_dir: Path = Path(".sluice/spool")
    spool_max_mb: Annotated[int, Field(ge=1)] = 1024
    gap_settle_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 1000
    backfill_hours: Annotated[float, Field(ge=0, le=720)] = 0.0

    rollover_at: CommaSeparated = []

    drain_seconds: Annotated[float, Field(gt=0, le=600)] = 8.0
    metrics_host: str = "127.0.0.1"
    metrics_port: Port | None = None
    log_level: Literal["TRACE", "DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_file: Path | None = None

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("symbols")
    @classmethod
    def _are_markets(cls, value: list[str]) -> list[str]:
        for text in value:
            parse_market(text)
        return value

    @field_validator("streams")
    @classmethod
    def _are_any(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("name at least one stream")
        return value

    @field_validator("retention_days")
    @classmethod
    def _are_candles_made_first(cls, value: dict[str, int]) -> dict[str, int]:
        if value.get("trades", LEAST_TRADE_DAYS) < LEAST_TRADE_DAYS:
            raise ValueError(
                f"trades must be kept for {LEAST_TRADE_DAYS} days or more: candles are brought up "
                "to date until a day before their trades are dropped"
            )
        return value

    @field_validator("rollover_at")
    @classmethod
    def _are_times(cls, value: list[str]) -> list[str]:
        for text in value:
            if not re.fullmatch(r"(?:[01]\d|2[0-3]):[0-5]\d", text):
                raise ValueError(f"{text!r} is no time of day; UTC, for example 03:00,15:00")
        return value

    @field_validator("proxy_url")
    @classmethod
    def _is_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not _is_proxy_url(value.get_secret_value()):
            raise ValueError("a proxy looks like http://host:port or socks5://user:pass@host:port")
        return value

    @field_validator("book_shard")
    @classmethod
    def _is_shard(cls, value: str) -> str:
        index, count = map(int, value.split("/"))
        if index >= count:
            raise ValueError(f"there is no shard {value}; of four, the last is 3/4")
        return value

    @model_validator(mode="after")
    def _are_streams(self) -> "Settings":
        for name in sorted({market.exchange for market in self.markets}):
            pattern = EXCHANGES[name].streams
            for stream in self.streams:
                if not pattern.fullmatch(stream):
                    raise ValueError(f"STREAMS: {stream!r} is none of {name}'s: {pattern.pattern}")
        return self

    @property
    def rollover_times(self) -> list[dt.time]:
        """The times of ROLLOVER_AT."""
        return [dt.time.fromisoformat(text) for text in self.rollover_at]

    @property
    def markets(self) -> list[Market]:
        """The markets of SYMBOLS, each once, in the order given."""
        return list(dict.fromkeys(parse_market(text) for text in self.symbols))


class BadSettingsError(ValueError):
    """What is wrong with the settings, a line each."""


def load(*, needs_symbols: bool = False) -> Settings:
    """Read the settings.

    Raises:
        BadSettingsError: a value is bad, a name in `.env` is misspelt, or SYMBOLS is missing.
    """
    files = [ENV_FILE, *_service_files()]
    try:
        for path in files:
            _refuse_misspelt(path, dotenv_values(path) if Path(path).is_file() else ())
        settings = Settings(_env_file=files, _secrets_dir=os.environ.get("CREDENTIALS_DIRECTORY"))
    except UnicodeDecodeError as error:
        raise BadSettingsError(f"{ENV_FILE}: it is not UTF-8 text ({error})") from None
    except ValidationError as error:
        # What every table is given is wrong once, not once a table.
        raise BadSettingsError("\n".join(dict.fromkeys(_explain(error)))) from None
    if needs_symbols and not settings.symbols:
        raise BadSettingsError(
            "SYMBOLS is not set: name the markets to record, for example "
            "SYMBOLS=binance:BTCUSDT,binance:ETHUSDT"
        )
    return settings


def _service_files() -> list[str]:
    """Give the files that a service manager took our environment from, named in SLUICE_ENV_FILES.

    It read them once, at the start. What stands in them is taken out of the environment, so that a
    later load sees them as they are then.
    """
    named = filter(None, os.environ.get("SLUICE_ENV_FILES", "").split(":"))
    files = [path for path in named if os.access(path, os.R_OK)]
    for path in files:
        for name in dotenv_values(path):
            if name.lower() in Settings.model_fields:
                os.environ.pop(name, None)
    return files


def load_or_exit(*, needs_symbols: bool = False) -> Settings:
    """Read the settings, or say what is wrong with them and exit with code 2."""
    try:
        return load(needs_symbols=needs_symbols)
    except BadSettingsError as error:
        _exit(str(error))


def _exit(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    raise SystemExit(EXIT_BAD_SETTINGS)


def _explain(error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        name = str(problem["loc"][0]).upper() if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        yield f"{name}: {message}{accepted(name)}" if name else message


def accepted(name: str) -> str:
    """Say what a variable accepts and what its default is, or nothing for an unknown one."""
    field = Settings.model_fields.get(name.lower())
    if field is None or field.annotation is None:
        return ""
    annotation, rules = field.annotation, list(field.metadata)
    options = get_args(annotation)
    if type(None) in options:
        (annotation,) = (option for option in options if option is not type(None))
        if get_origin(annotation) is Annotated:
            annotation, *about = get_args(annotation)
            rules += [rule for entry in about for rule in getattr(entry, "metadata", [])]
    bounds = [
        f"{word} {getattr(rule, key)}"
        for rule in rules
        for key, word in (("ge", "from"), ("gt", "above"), ("le", "to"))
        if getattr(rule, key, None) is not None
    ]
    default = (
        "" if field.default in (None, [], {}, "") else f"; the default is {_text(field.default)}"
    )
    return f" (accepted: {' '.join([_type_name(annotation), *bounds])}{default})"


def _text(value: object) -> str:
    """Write a value as one writes it in `.env`."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:  # noqa: ANN401  # a type expression
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list[str]: "a list, comma separated",
        Path: "a path",
    }
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is dict:
        value, example = ("a period", "6h") if "timedelta" in str(annotation) else ("days", "30")
        return f"{value} for every table, or such as trades={example},klines={example}"
    return names.get(annotation, "a text")


def _refuse_misspelt(path: str, names: Iterable[str]) -> None:
    known = {field.upper() for field in Settings.model_fields}
    for name in names:
        if name.upper() in known or re.fullmatch(r"[A-Z0-9_]+", name.upper()) is None:
            continue
        close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
        if close:
            raise BadSettingsError(f"{path}: there is no setting {name}; did you mean {close[0]}?")
