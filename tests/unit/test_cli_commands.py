"""The page about the commands says what the commands say."""

from pathlib import Path

from sluice.cli.commands import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"


def test_the_page_is_what_the_commands_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "make docs writes it anew"


def test_every_command_has_an_explanation() -> None:
    sections = markdown().split("\n## ")[1:]
    assert len(sections) > 20
    for section in sections:
        assert len(section.split("\n\n")[1]) > 20, section
