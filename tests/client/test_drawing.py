"""An answer and its receipt as a terminal and a notebook show them."""

from html.parser import HTMLParser

import pytest
from rich.console import Console

from azu.api.openai import AnsweredCall, AnswerMessage, ChatChoice, FunctionCall
from azu.api.receipts import ReceiptLines
from azu.client import Generation
from azu.client.drawing import shares
from tests.client.answers import RECEIPT

EXPERTS = {"2": [0, 1, 2], "3": [5]}


def piece(node: str, start: int, end: int, experts: dict[str, list[int]] | None = None) -> dict[str, object]:
    return {"node": node, "actor": f"of {node}", "layers": [start, end], "experts": experts or {}}


def receipt(*pieces: dict[str, object], layers: int = 6) -> ReceiptLines:
    return ReceiptLines.model_validate(RECEIPT | {"topology": pieces, "num_layers": layers})


def answer(found: ReceiptLines, received: int = 2, **message: object) -> Generation[ChatChoice]:
    said = AnswerMessage(content="Paris.", **message)
    choice = ChatChoice(index=0, message=said, logprobs=None, finish_reason="stop")
    return Generation("azu/tiny-moe", "job-1", (choice,), found, received)


def printed(found: object) -> list[str]:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(found)
    return [line.rstrip() for line in capture.get().splitlines()]


class Shown(HTMLParser):
    """The texts, the titles and the widths of a notebook's output."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[str]()
        self.titles, self.widths = list[str](), list[int]()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        if "title" in given:
            self.titles.append(given["title"])
            self.widths.append(int(given["style"].partition("flex:")[2].partition(";")[0]))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


SPLIT = receipt(piece("cy", 0, 0, EXPERTS), piece("bob", 4, 6), piece("ada", 0, 4, {"2": [7]}))


def test_each_node_has_its_layers_and_its_experts_apart_in_the_order_of_the_layers() -> None:
    found = shares(SPLIT)

    assert [(one.node, one.spans, one.experts) for one in found] == [
        ("ada", ((0, 4),), 0), ("bob", ((4, 6),), 0), ("cy", (), 4),
    ]  # fmt: skip
    assert len({one.colour for one in found}) == len({one.fill for one in found}) == 3


def test_a_terminal_shows_the_answer_a_bar_by_layers_and_the_cost() -> None:
    lines = printed(answer(SPLIT))

    assert lines == [
        "Paris.",
        "",
        "█" * 40 + "▓" * 20,
        "█ ada: layers 0 to 3",
        "▓ bob: layers 4 to 5",
        "▒ cy: 4 experts",
        "3 prompt + 2 completion tokens x 6 layers: 0.0000006 HYPE (job-1)",
    ]


def test_a_notebook_shows_the_same() -> None:
    shown = Shown(answer(SPLIT)._repr_html_())

    assert shown.titles == ["ada: layers 0 to 3", "bob: layers 4 to 5"]
    assert shown.widths == [4, 2]
    for text in ("Paris.", "ada: layers 0 to 3", "cy: 4 experts", "0.0000006 HYPE (job-1)"):
        assert text in shown.text


def test_a_difference_between_receipt_and_answer_is_shown() -> None:
    told = "2 tokens of the answer were charged, 1 came"

    assert printed(answer(SPLIT, received=1))[-1] == told
    assert told in Shown(answer(SPLIT, received=1)._repr_html_()).text
    assert told not in Shown(answer(SPLIT)._repr_html_()).text


def test_reasoning_and_tool_calls_are_shown() -> None:
    call = AnsweredCall(id="call_0", function=FunctionCall(name="weather", arguments='{"city": "Paris"}'))
    found = answer(SPLIT, reasoning_content="Where is it?", tool_calls=(call,))

    assert printed(found)[:3] == ["Where is it?", "Paris.", 'weather({"city": "Paris"})']
    assert 'weather({"city": "Paris"})' in Shown(found._repr_html_()).text


def test_what_others_wrote_neither_acts_on_a_terminal_nor_becomes_html() -> None:
    hostile = "\x1b[2J<script>alert(1)</script>\"'"
    found = answer(receipt(piece(hostile, 0, 6)), reasoning_content=hostile)

    shown = Shown(found._repr_html_())
    assert "\x1b" not in "\n".join(printed(found))
    assert "script" not in shown.tags
    assert len(shown.titles) == 1


@pytest.mark.parametrize("layers", [1, 61, 126])
def test_every_span_is_seen_however_many_there_are(layers: int) -> None:
    found = receipt(*(piece(f"node-{at}", at, at + 1) for at in range(layers)), layers=layers)

    bar = printed(answer(found))[2 : 2 + (layers > 80) + 1]
    assert len("".join(bar)) == max(60, layers)


def test_a_receipt_without_places_is_no_error() -> None:
    assert printed(answer(receipt()))[2:] == [
        "", "3 prompt + 2 completion tokens x 6 layers: 0.0000006 HYPE (job-1)"
    ]  # fmt: skip
