"""Each alert in configs/prometheus names metrics that azu shows, and fires where it has to and not else."""

import ast
import operator
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from azu.files import CONFIGS
from azu.metrics import BY_NAME

FILE = CONFIGS / "prometheus" / "alerts.yaml"
RULES = {
    rule["alert"]: rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
}
NOW_S = 2_000_000_000.0
DAY_S = 86_400.0

Labels = frozenset[tuple[str, str]]
Series = Mapping[str, float]  # such as 'azu_nodes{state="alive"}' -> 3
HEALTHY: Series = {
    'azu_nodes{state="alive"}': 3,
    'azu_nodes{state="dead"}': 1,
    'azu_jobs{state="waiting"}': 2,
    'azu_jobs{state="running"}': 5,
    'azu_unhealthy_loops{component="scheduler"}': 0,
    "azu_signer_findings": 0,
    "azu_ledger_lost_writes": 0,
    "azu_wallet_lamports": 1_000,
    'azu_lamports_held{account="user_available"}': 800,
    'azu_lamports_held{account="suspense"}': 0,
    "azu_fee_missing": 0,
    "azu_chain_actions_left": 9_000,
    'azu_payout_limit_used_ratio{kind="withdrawal"}': 0.8,
    'azu_last_done_timestamp_seconds{what="backup"}': NOW_S - DAY_S,
    'azu_last_done_timestamp_seconds{what="audit"}': NOW_S - DAY_S,
    'azu_disk_free_ratio{store="money"}': 0.5,
    'azu_disk_free_ratio{store="jobs"}': 0.1,
    'azu_certificate_ends_timestamp_seconds{certificate="ingress"}': NOW_S + 300 * DAY_S,
}
# What changes for each alert to fire: a new value, or None for a series that is not there.
FIRES: Mapping[str, Mapping[str, float | None]] = {
    "AzuPayoutsWait": {"azu_signer_findings": 1},
    "AzuLedgerWentBack": {"azu_ledger_lost_writes": 1},
    "AzuWalletNearWhatIsOwed": {"azu_wallet_lamports": 815},
    "AzuFeeCurrencyMissing": {"azu_fee_missing": 1},
    "AzuActionsRunOut": {"azu_chain_actions_left": 499},
    "AzuDayLimitNear": {'azu_payout_limit_used_ratio{kind="withdrawal"}': 0.81},
    "AzuSuspense": {'azu_lamports_held{account="suspense"}': 1},
    "AzuBackupOld": {'azu_last_done_timestamp_seconds{what="backup"}': NOW_S - 1.51 * DAY_S},
    "AzuNoWallet": {"azu_wallet_lamports": None},
    "AzuNoLimits": {'azu_payout_limit_used_ratio{kind="withdrawal"}': None},
    "AzuNoBooks": {"azu_signer_findings": None},
    "AzuNoBackup": {'azu_last_done_timestamp_seconds{what="backup"}': None},
    "AzuAuditOld": {'azu_last_done_timestamp_seconds{what="audit"}': NOW_S - 1.51 * DAY_S},
    "AzuNoAudit": {'azu_last_done_timestamp_seconds{what="audit"}': None},
    "AzuDiskNearlyFull": {'azu_disk_free_ratio{store="jobs"}': 0.09},
    "AzuCertificateEnds": {
        'azu_certificate_ends_timestamp_seconds{certificate="ingress"}': NOW_S + 13 * DAY_S
    },
    "AzuLoopFails": {'azu_unhealthy_loops{component="scheduler"}': 1},
    "AzuJobsWait": {'azu_jobs{state="running"}': 0},
    "AzuNodesGone": {'azu_nodes{state="alive"}': 0},
    "AzuNoMetrics": {'azu_nodes{state="alive"}': None, 'azu_nodes{state="dead"}': None},
}


@dataclass(frozen=True)
class Vector:
    """PromQL's instant vector: values by labels. Two meet only where their labels are the same."""

    values: Mapping[Labels, float]

    def meet(self, other: "Vector | float", join: Callable[[float, float], float]) -> "Vector":
        if isinstance(other, Vector):
            shared = self.values.keys() & other.values.keys()
            return Vector({one: join(self.values[one], other.values[one]) for one in shared})
        return Vector({one: join(value, other) for one, value in self.values.items()})


_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Gt: operator.gt, ast.Lt: operator.lt,
    ast.Eq: operator.eq,
}  # fmt: skip


def labels_of(text: str) -> Labels:
    return frozenset(re.findall(r'(\w+)="([^"]*)"', text))


def evaluate(expression: str, series: Series) -> Vector:
    """Return the value of an expression of the kind that the rules use."""

    def select(name: str, wanted: str) -> Vector:
        # Prometheus adds where a series comes from.
        source = ("instance", "head")
        found = {
            labels_of(one) | {source}: value
            for one, value in series.items()
            if one.partition("{")[0] == name and labels_of(wanted) <= labels_of(one)
        }
        return Vector(found)

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=number):
                return number
            case ast.Call(
                func=ast.Name(id="series"), args=[ast.Constant(value=name), ast.Constant(value=of)]
            ):
                return select(name, of)
            case ast.Call(func=ast.Name(id="time"), args=[]):
                return NOW_S
            case ast.Call(func=ast.Name(id="sum"), args=[one]):
                summed = value(one).values
                return Vector({frozenset(): sum(summed.values())} if summed else {})
            case ast.Call(func=ast.Name(id="absent"), args=[one]):
                return Vector({} if value(one).values else {frozenset(): 1.0})
            case ast.BinOp(left=left, op=op, right=right):
                return applied(value(left), value(right), _OPERATORS[type(op)])
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                left_value = value(left)
                compared = applied(left_value, value(right), _OPERATORS[type(op)])
                kept = (one for one, holds in compared.values.items() if holds)
                return Vector({one: left_value.values[one] for one in kept})
            case ast.BoolOp(op=ast.And(), values=[left, right]):
                return value(left).meet(value(right), lambda first, _: first)
        raise AssertionError(f"{expression}: {ast.dump(node)} is not read here")

    def applied(left: Any, right: Any, join: Callable[[Any, Any], Any]) -> Any:
        if isinstance(left, Vector):
            return left.meet(right, join)
        if isinstance(right, Vector):
            return right.meet(left, lambda first, second: join(second, first))
        return join(left, right)

    text = re.sub(
        r"\b(azu_\w+)(\{[^}]*\})?", lambda found: f"series({found[1]!r}, {found[2] or ''!r})", expression
    )
    result: Vector = value(ast.parse(text, mode="eval"))
    return result


def test_every_alert_has_a_case() -> None:
    assert FIRES.keys() == RULES.keys()


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_fires_where_it_has_to_and_is_silent_on_a_healthy_network(alert: str) -> None:
    changed = {name: value for name, value in (HEALTHY | FIRES[alert]).items() if value is not None}
    expression = RULES[alert]["expr"]

    assert evaluate(expression, changed).values, expression
    assert not evaluate(expression, HEALTHY).values, expression


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_names_metrics_and_labels_of_azu(alert: str) -> None:
    rule = RULES[alert]
    found = re.findall(r"\b(azu_\w+)(\{[^}]*\})?", rule["expr"])

    assert found
    for name, labels in found:
        assert {label for label, _ in labels_of(labels)} <= set(BY_NAME[name].labels)
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    # The samples here have the labels that azu gives.
    for one in HEALTHY:
        assert {label for label, _ in labels_of(one)} == set(BY_NAME[one.partition("{")[0]].labels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules() -> None:
    subprocess.run(("promtool", "check", "rules", str(FILE)), check=True, timeout=60)
