"""What `sluice dead list` shows of a record that somebody else made."""

from sluice.cli.dead import Letter, _row


def test_a_record_gives_the_terminal_no_orders() -> None:
    letter = Letter(queue="trade", reason="no trade", time=0, raw='["a\x1b[31m","\x00\n\u3042"]')
    assert _row("trade", 1, letter)["record"] == '["a\\x1b[31m","\\x00\\n\u3042"]'
