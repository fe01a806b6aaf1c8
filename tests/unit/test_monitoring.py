# SPDX-License-Identifier: BSD-3-Clause
"""The dashboard, the alerts and the documentation speak of metrics that there are."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.harness import ROOT
from tests.support.statuses import HOST, status
from tmemd.daemon.metrics import Snapshot, TickTimes, exposition
from tmemd.protocol import Problem
from tmemd.settings import PoolSettings

DASHBOARD = ROOT / "scripts" / "monitoring" / "dashboard.json"
ALERTS = ROOT / "scripts" / "monitoring" / "alerts.yml"
# What Prometheus adds to whatever it scrapes.
ADDED_METRICS = {"up"}
ADDED_LABELS = {"instance", "job"}

Known = dict[str, set[str]]


@pytest.fixture(scope="module")
def known() -> Known:
    """The labels of every metric, when all of them are there."""
    pool = msgspec.structs.replace(status("web"), settings=PoolSettings(cap=1, target=1))
    names: Known = {}
    for family in text_string_to_metric_families(
        exposition(Snapshot([pool], HOST, TickTimes(), [Problem("settings", "damaged")])).decode()
    ):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str, str]]:
    """Of the dashboard: panel, expression, legend."""
    return [
        (panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
    ]


def alerts() -> list[str]:
    return re.findall(r"^ +expr: (.+)$", ALERTS.read_text(), re.MULTILINE)


def check(expression: str, known: Known) -> None:
    """Every name is a metric, and every label one that it has."""
    names = set(re.findall(r"\b(?:tmemd|process)_\w+", expression))
    assert names <= known.keys() | ADDED_METRICS, expression
    labels = set().union(*(known[name] for name in names), ADDED_LABELS)
    matched = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression))
    grouped = {label for group in re.findall(r"\b(?:by|on|ignoring|without)\s*\(([^)]*)\)", expression)
               for label in re.findall(r"\w+", group)}  # fmt: skip
    assert matched | grouped <= labels, expression


def test_the_dashboard_asks_for_metrics_that_exist(known: Known) -> None:
    for _, expression, legend in queries():
        assert re.search(r"\btmemd_", expression)
        check(expression, known)
        assert set(re.findall(r"\{\{\s*(\w+)", legend)) <= {"pool"} | ADDED_LABELS


def test_the_alerts_ask_for_metrics_that_exist(known: Known) -> None:
    assert len(alerts()) == ALERTS.read_text().count("- alert:")
    for expression in alerts():
        check(expression, known)


def test_every_alert_has_a_test_for_promtool() -> None:
    cases = ALERTS.with_name("alerts.test.yml").read_text()
    for name in re.findall(r"- alert: (\w+)", ALERTS.read_text()):
        assert name in cases


def test_the_dashboard_shows_what_it_should() -> None:
    asked = " ".join(expression for _, expression, _ in queries())
    for metric in (
        "used_bytes", "target_bytes", "gets_total", "file_reads_total", "puts_refused_total", "spills_total",
        "demotions_total", "operation_seconds_bucket", "never_trims", "payload_bytes", "weight",
    ):  # fmt: skip
        assert f"tmemd_pool_{metric}" in asked
    for metric in ("budget_bytes", "host_memory_available_bytes", "host_memory_reserve_bytes", "pressure_ratio"):
        assert metric in asked


def test_the_dashboard_can_be_imported_anywhere() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "host", "pool"}
    assert dashboard["id"] is None
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used <= variables | {"__rate_interval"}
    assert set(re.findall(r'"uid": "([^"]*)"', json.dumps(dashboard["panels"]))) == {"${datasource}"}
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(set(places)) == len(places)


def test_every_metric_is_documented_and_nothing_else(known: Known) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    there = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if not name.startswith("process_")}
    assert documented == there
    for expression in re.findall(r"^    (.*tmemd_pool_\w+.*)$", text, re.MULTILINE):
        check(expression, known)


def test_prometheus_can_parse_every_query() -> None:
    for expression in [expression for _, expression, _ in queries()] + alerts():
        promql_parser.parse(expression.replace("$__rate_interval", "1m"))  # raises ValueError
