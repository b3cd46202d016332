"""The alert rules: they ask for metrics that exist, and fire when they say they do."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "sluice.rules.yml"
CASES = RULES.with_name("sluice.rules.test.yml")
SOURCES = ("collector", "flusher", "orderbook", "sluice")
PROMTOOL = shutil.which("promtool")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_metric_of_a_rule_is_one_that_a_process_exports() -> None:
    source = "".join(
        path.read_text(encoding="utf-8")
        for package in SOURCES
        for path in (ROOT / package).rglob("*.py")
    )
    exported = {
        f"sluice_{name}" + ("_total" if kind == "counter" else "")
        for kind, name in re.findall(r'\b(counter|gauge)\(\s*"(\w+)"', source)
    }
    asked = {name for rule in rules() for name in re.findall(r"\bsluice_\w+", rule["expr"])}
    assert asked
    assert asked <= exported


def test_every_alert_is_tested_firing() -> None:
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]
    fired = {
        check["alertname"]
        for case in cases
        for check in case["alert_rule_test"]
        if check["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here")
def test_the_alerts_fire_when_they_say_they_do() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", CASES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
