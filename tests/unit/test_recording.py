"""Recordings: what is written is read back, whatever was cut off, and other people's are read."""

import gzip
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sluice.exchanges import EXCHANGES
from sluice.recording import BadRecordingError, Line, RecordingFile, Tape, read_lines

FRAME = (
    b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1,"s":"BTCUSDT","t":7,"p":"1","q":"2",'
    b'"T":1,"m":true,"M":true}}'
)
IMAGE = b'{"lastUpdateId":7,"bids":[["1","1"]],"asks":[["2","1"],["3","1"]]}'
T = 1_790_000_000_000_000


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "file.gz")
    file.append([(T, FRAME), (T + 1, b'{"lastUpdateId":7,\n"bids":[]}')])
    file.append([(T + 2, FRAME)])
    file.close()

    assert list(read_lines(file.path)) == [
        Line(T, FRAME),
        Line(T + 1, b'{"lastUpdateId":7, "bids":[]}', ""),
        Line(T + 2, FRAME),
    ]
    assert (file.lines, file.bytes) == (3, file.path.stat().st_size)
    with pytest.raises(FileExistsError):
        RecordingFile(file.path)


def test_a_file_that_was_cut_off_is_read_up_to_its_last_whole_block(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "file.gz")
    file.append([(T, FRAME)])
    whole = file.bytes
    file.append([(T + number, FRAME) for number in range(1, 9)])
    file.close()

    for size in (whole, whole + 1, whole + 12, file.bytes - 1):
        file.path.write_bytes(file.path.read_bytes()[:size])
        assert next(read_lines(file.path)) == Line(T, FRAME)
        for line in read_lines(file.path):
            assert line.payload == FRAME


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Have the system refuse to let files grow; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_block_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    file = RecordingFile(tmp_path / "file.gz")
    file.append([(T, FRAME)])
    whole = file.bytes

    with files_no_larger_than(whole + 20), pytest.raises(OSError, match="File too large"):
        file.append([(T + 1, FRAME)])

    assert file.path.stat().st_size == file.bytes == whole
    file.append([(T + 1, FRAME)])
    file.close()
    assert [line.ts_recv for line in read_lines(file.path)] == [T, T + 1]


def test_nanoseconds_and_plain_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_bytes(b"1790000000000000999 " + FRAME + b"\r\n1790000000000001000 " + IMAGE + b"\n")

    assert list(read_lines(path)) == [Line(T, FRAME), Line(T + 1, IMAGE, "")]


def test_captures_of_sockets_and_rest_are_read(tmp_path: Path) -> None:
    path = tmp_path / "capture.gz"
    with gzip.open(path, "wb") as file:
        file.write(
            b'configuration: {"trades":["BTC-USDT"]}\n'
            b"wss://stream <-> 1790000000.0\n"
            b"wss://stream <- 1790000000.1: {}\n"
            b"https://api/api/v3/depth?symbol=BTCUSDT&limit=1000 -> 1790000000.25: " + IMAGE + b"\n"
            b"https://api/api/v3/exchangeInfo -> 1790000000.5: {}\n"
            b"1790000000.75: " + FRAME + b"\n\n"
        )

    assert list(read_lines(path)) == [
        Line(T + 250_000, IMAGE, "BTCUSDT", 1000),
        Line(T + 500_000, b"{}"),
        Line(T + 750_000, FRAME),
    ]


@pytest.mark.parametrize("text", [b"no recording\n", b'179 {"e":1}\n', FRAME + b"\n"])
def test_what_is_no_recording_is_said(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(text)

    with pytest.raises(BadRecordingError, match=f"{path}: line 1"):
        list(read_lines(path))


def test_a_tape_merges_files_and_knows_whose_images_they_hold(tmp_path: Path) -> None:
    for name, symbol, start in (("b", "BTCUSDT", 1), ("e", "ETHUSDT", 0)):
        frame = FRAME.replace(b"BTCUSDT", symbol.encode())
        file = RecordingFile(tmp_path / name)
        file.append([(T + start, frame), (T + start + 2, IMAGE), (T + start + 4, frame)])
        file.close()
    tape = Tape.of(EXCHANGES["binance"], [tmp_path / "b", tmp_path / "e"])

    assert [line.ts_recv - T for line in tape] == [0, 1, 2, 3, 4, 5]
    assert [line.symbol for line in tape if line.symbol] == ["ETHUSDT", "BTCUSDT"]
    assert tape.symbols() == ["BTCUSDT", "ETHUSDT"]


@pytest.mark.parametrize(
    ("bids", "asks", "is_cut"), [(305, 818, False), (3, 1000, True), (7, 7, True), (0, 5, False)]
)
def test_an_image_is_trusted_to_its_end_only_where_it_shows_it(
    bids: int, asks: int, *, is_cut: bool
) -> None:
    body = '{{"lastUpdateId":7,"bids":[{}],"asks":[{}]}}'.format(
        ",".join(f'["{100_000 - n}","1"]' for n in range(bids)),
        ",".join(f'["{200_000 + n}","1"]' for n in range(asks)),
    )
    image = Tape(EXCHANGES["binance"], []).image(Line(T, body.encode(), "BTCUSDT"))

    assert (image.limit <= max(bids, asks)) is is_cut
