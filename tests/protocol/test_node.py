"""A machine names itself, and its name does nothing to what shows it."""

from dataclasses import replace

from tests.builders import node


def test_a_report_has_names_that_anything_may_show() -> None:
    plain = node("n1", name="ada", device="cuda:0")
    hostile = replace(plain, name="ada\x1b[2J\n" + "x" * 100, device="\x9bcpu", payout_address="0x1\u202e")

    shown = hostile.with_plain_names()

    assert plain.with_plain_names() == plain
    assert shown.name.startswith("ada\\u001b[2J\\nxxx")
    assert len(shown.name) == 64
    assert (shown.device, shown.payout_address) == ("\\u009bcpu", "0x1\\u202e")
