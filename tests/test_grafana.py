"""The Grafana dashboard is one that Grafana loads, and has a panel for every metric."""

import re

from tests.dashboard import DRAWN, SOURCES, dashboard, panels


def test_the_file_is_a_dashboard_that_grafana_loads() -> None:
    found = dashboard()

    assert found["uid"] == "azu"
    assert found["schemaVersion"] >= 27
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    variables = {variable["name"]: variable for variable in found["templating"]["list"]}
    assert [option["value"] for option in variables["source"]["options"]] == list(SOURCES)
    for panel in panels():
        assert panel["datasource"] == "${datasource}"
        assert panel["targets"]
        assert panel["title"]


def test_every_metric_is_on_a_panel() -> None:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]

    names = re.findall(r"\$\{source\}_(\w+)", " ".join(expressions))

    assert {name.removesuffix("_bucket") for name in names} == {
        metric.name.removeprefix("azu_") for metric in DRAWN
    }
