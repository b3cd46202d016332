"""Settings: what is accepted, how a bad one is told, and that each is documented."""

import os
import re
from datetime import timedelta
from pathlib import Path

import pytest

from sluice.cli.configuration import markdown
from sluice.settings import BadSettingsError, Market, Settings, load, load_or_exit

EXAMPLE = Path(__file__).parents[2] / ".env.example"
NAMES = {field.upper() for field in Settings.model_fields}


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for name in [*NAMES, "CREDENTIALS_DIRECTORY"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_every_setting_stands_in_the_example_with_its_default() -> None:
    shown = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))
    assert set(shown) == NAMES
    examples = {"SYMBOLS"}  # nothing is recorded unless it is named
    for name, field in Settings.model_fields.items():
        default = field.default
        if name.upper() in examples:
            continue
        if isinstance(default, bool):
            text = str(default).lower()
        elif isinstance(default, list | dict):
            text = ",".join(default)
        elif isinstance(default, float):
            text = f"{default:g}"
        else:
            text = "" if default is None else str(default)
        assert shown[name.upper()] == text, name


def test_every_setting_of_the_example_has_a_line_on_what_it_does() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#[A-Z_]+=", line):
            assert re.match(r"# \S.*[.]$", lines[number - 1]), line


def test_the_example_can_be_used_as_it_is(tmp_path: Path) -> None:
    text = re.sub(r"^#([A-Z_]+=)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(text)
    settings = load(needs_symbols=True)
    assert settings.markets == [Market("binance", "BTCUSDT"), Market("binance", "ETHUSDT")]
    assert settings.model_copy(update={"symbols": []}) == Settings(_env_file=None)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("FLUSH_BATCH_SIZE", "0", "a whole number from 1 to 100000; the default is 5000"),
        ("FLUSH_BATCH_SIZE", "many", "a whole number from 1 to 100000; the default is 5000"),
        ("DRAIN_SECONDS", "0", "a number above 0 to 600; the default is 8.0"),
        ("DRAIN_SECONDS", "nan", "a number above 0 to 600; the default is 8.0"),
        ("REDIS_TLS", "perhaps", "true or false; the default is false"),
        ("METRICS_PORT", "99999", "a whole number from 0 to 65535"),
        ("LOG_LEVEL", "loud", "one of TRACE, DEBUG, INFO, WARNING, ERROR; the default is INFO"),
        ("POSTGRES_SSLMODE", "maybe", "one of disable, allow, prefer, require, verify-ca, "),
        ("BINANCE_SPOT_WS_URL", "ftp://x", "a text; the default is wss://stream.binance.com:9443"),
        (
            "BINANCE_SPOT_REST_URL",
            "https://x/path",
            "a text; the default is https://api.binance",
        ),
        ("SYMBOLS", "binance:BTC USDT", "a list, comma separated"),
        ("SYMBOLS", "nowhere:BTCUSDT", "a list, comma separated"),
        ("STREAMS", ",", "a list, comma separated; the default is trade"),
        ("BOOK_SHARD", "4/4", "a text; the default is 0/1"),
        ("PROXY_URL", "ftp://x", "a text"),
        ("RETENTION_DAYS", "trade=30", "days for every table, or such as trades=30"),
        ("RETENTION_DAYS", "klines=0", "days for every table, or such as trades=30"),
        ("RETENTION_DAYS", "trades=1", "days for every table, or such as trades=30"),
        ("CHUNK_INTERVAL", "12", "a period for every table, or such as trades=6h"),
        ("CHUNK_INTERVAL", "trades=0h", "a period for every table, or such as trades=6h"),
        ("COLUMNSTORE_AFTER_DAYS", "0", "a whole number from 1 to 36500; the default is 7"),
    ],
)
def test_a_bad_value_is_one_line_with_the_variable_and_what_is_accepted(
    name: str, value: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert f"(accepted: {accepted}" in message
    assert "\n" not in message


def test_a_stream_that_the_venue_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMBOLS", "BTCUSDT")
    monkeypatch.setenv("STREAMS", "trade,depth")
    with pytest.raises(BadSettingsError, match=r"\ASTREAMS: 'depth' is none of binance's: trade"):
        load()


def test_each_bad_value_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PORT", "a")
    monkeypatch.setenv("DEAD_MAX", "b")
    with pytest.raises(BadSettingsError) as caught:
        load()
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "REDIS_PORT",
        "DEAD_MAX",
    ]


def test_a_process_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_PORT", "a")
    with pytest.raises(SystemExit) as caught:
        load_or_exit()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("REDIS_PORT: ")


def test_without_symbols_there_is_nothing_to_record() -> None:
    assert load().markets == []
    with pytest.raises(BadSettingsError, match=r"\ASYMBOLS is not set: .*SYMBOLS=binance:BTCUSDT"):
        load(needs_symbols=True)


@pytest.mark.parametrize("name", ["SYMBOL", "REDIS_HSOT", "postgres_pasword", "FLUSH_BATCHSIZE"])
def test_a_misspelt_name_in_the_file_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"{name}=1\n")
    with pytest.raises(BadSettingsError, match=rf"there is no setting {name}; did you mean "):
        load()


@pytest.mark.parametrize("name", ["HOME", "GRAFANA_PORT", "COMPOSE_PROJECT_NAME"])
def test_a_name_that_is_nobody_s_misspelling_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"{name}=1\n")
    load()


def test_the_environment_goes_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("REDIS_PORT=1\nREDIS_DB=2\n")
    monkeypatch.setenv("REDIS_PORT", "3")
    settings = load()
    assert (settings.redis_port, settings.redis_db) == (3, 2)


def test_a_bare_symbol_is_binance_s_and_each_market_is_there_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SYMBOLS", " BTCUSDT, simulator:BTCUSDT ,binance:BTCUSDT,,ETHUSDT")
    assert [str(market) for market in load().markets] == [
        "binance:BTCUSDT",
        "simulator:BTCUSDT",
        "binance:ETHUSDT",
    ]


SECRETS = ["REDIS_PASSWORD", "POSTGRES_PASSWORD", "PROXY_URL"]


def test_files_that_a_service_manager_read_are_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sluice.env"
    file.write_text("SYMBOLS=binance:BTCUSDT\nLANG=C\n")
    monkeypatch.setenv("SLUICE_ENV_FILES", f"{file}:{tmp_path / 'absent.env'}")
    for name, value in {"SYMBOLS": "binance:BTCUSDT", "LANG": "C", "DEAD_MAX": "3"}.items():
        monkeypatch.setenv(name, value)
    settings = load()
    assert (settings.symbols, settings.dead_max) == (["binance:BTCUSDT"], 3)
    assert os.environ["LANG"] == "C"
    file.write_text("SYMBOLS=binance:ETHUSDT\n")
    assert load().symbols == ["binance:ETHUSDT"]
    file.write_text("")
    assert load().symbols == []
    file.write_text("SYMBOL=binance:ETHUSDT\n")
    with pytest.raises(BadSettingsError, match=r"sluice\.env: there is no setting SYMBOL"):
        load()


SECRET = "http://user:hunter2@proxy:8080"  # noqa: S105  # a made-up one


def test_passwords_are_in_no_text_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    settings = load()
    assert settings.redis_password is not None
    assert settings.redis_password.get_secret_value() == SECRET
    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump()}"
    assert "hunter2" not in settings.model_dump_json()


def test_passwords_are_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXY_URL", "user:hunter2@proxy")
    monkeypatch.setenv("REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("REDIS_PORT", "hunter2")
    monkeypatch.setenv("STREAMS", "depth")
    monkeypatch.setenv("SYMBOLS", "BTCUSDT")
    with pytest.raises(BadSettingsError) as caught:
        load()
    assert "PROXY_URL" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_secrets_come_from_the_directory_that_systemd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis_password").write_text("hunter2\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    password = load().redis_password
    assert password is not None
    assert password.get_secret_value() == "hunter2"


def test_the_page_of_the_settings_is_what_the_settings_say() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "configuration.md").read_text()
    example = (root / ".env.example").read_text()
    assert page == markdown(example), "python -m sluice.cli.configuration > docs/configuration.md"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BINANCE_SPOT_WS_URL", "https://stream"),
        ("BINANCE_SPOT_WS_URL", "wss://user:hunter2@stream"),
        ("BINANCE_SPOT_REST_URL", "wss://api"),
        ("BINANCE_SPOT_REST_URL", "https://api?x=1"),
    ],
)
def test_a_base_is_of_its_scheme_and_nothing_more(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettingsError, match=rf"^{name}: a base looks like") as caught:
        load()
    assert "hunter2" not in str(caught.value)


def test_an_env_file_that_is_no_text_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"\xff=1\n")
    with pytest.raises(BadSettingsError, match=r"^\.env: it is not UTF-8 text"):
        load()


def test_what_is_set_by_table_goes_before_what_is_set_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RETENTION_DAYS", "klines=400, 30")
    monkeypatch.setenv("CHUNK_INTERVAL", "trades=6h,klines=60d")
    settings = load()
    assert settings.retention_days == {
        "trades": 30,
        "orderbook_snapshots": 30,
        "klines": 400,
        "tickers": 30,
    }
    assert settings.chunk_interval == {"trades": timedelta(hours=6), "klines": timedelta(days=60)}
