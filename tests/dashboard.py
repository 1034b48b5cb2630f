"""The Grafana dashboard: its panels, their expressions, and the metrics that they have to show."""

import json
from importlib.resources import files
from typing import Any

from azu.metrics import (
    ACTIONS_LEFT,
    CATALOGUE,
    CERTIFICATE_ENDS,
    DISK_FREE,
    FEE_MISSING,
    LAST_DONE,
    LIMIT_USED,
    WALLET,
)

SOURCES = ("ray_azu", "azu")
# These are for alerts: most come from the treasury, which Ray's agents do not scrape.
ALERTS_ONLY = (ACTIONS_LEFT, CERTIFICATE_ENDS, DISK_FREE, FEE_MISSING, LAST_DONE, LIMIT_USED, WALLET)
DRAWN = tuple(metric for metric in CATALOGUE if metric not in ALERTS_ONLY)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("configs") / "grafana" / "azu.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions(panel: dict[str, Any], source: str) -> list[str]:
    return [
        target["expr"].replace("${source}", source).replace("$__rate_interval", "30s")
        for target in panel["targets"]
    ]
