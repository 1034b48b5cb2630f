"""An answer and its receipt for a terminal and for a notebook: what was said, who ran it, what it cost."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape

from rich.console import Group
from rich.text import Text

from azu.api.openai import AnswerMessage
from azu.api.receipts import ReceiptLines
from azu.printable import printable
from azu.units import hype_from_lamports

# Colours that people with colour blindness tell apart; the fills do it where there are no colours.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
_FILLS = "█▓▒░"
_BAR_CELLS = 60


@dataclass(frozen=True, slots=True)
class Share:
    """What a node ran of a job: spans of layers, [start, end), and experts apart from their routers."""

    node: str
    spans: tuple[tuple[int, int], ...]
    experts: int
    colour: str
    fill: str

    @property
    def work(self) -> str:
        """The layers and experts in words."""
        spans = ", ".join(f"{start} to {end - 1}" for start, end in self.spans)
        parts = [f"layers {spans}"] * bool(spans) + [f"{self.experts} experts"] * bool(self.experts)
        return "; ".join(parts)


def shares(receipt: ReceiptLines) -> tuple[Share, ...]:
    """Return what each node ran, in the order of the layers; a node with experts alone comes last."""
    spans: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    experts: Counter[str] = Counter()
    for piece in receipt.topology:
        start, end = piece.layers
        if end > start:
            spans[piece.node].append((start, end))
        else:
            experts[piece.node] += sum(map(len, piece.experts.values()))
    nodes = sorted(spans, key=lambda node: (min(spans[node]), node))
    nodes += sorted(experts.keys() - spans.keys())
    return tuple(
        Share(
            node=printable(node),
            spans=tuple(sorted(spans.get(node, ()))),
            experts=experts[node],
            colour=_COLOURS[index % len(_COLOURS)],
            fill=_FILLS[index % len(_FILLS)],
        )
        for index, node in enumerate(nodes)
    )


def bar(receipt: ReceiptLines) -> Text:
    """Return a line with a part for each span of layers, and below it a line for each node."""
    found = shares(receipt)
    parts = _parts(found)
    layers, drawn, before = sum(end - start for (start, end), _ in parts), Text(), 0
    for (start, end), share in parts:
        first, before = before, before + end - start
        cells = before * _BAR_CELLS // layers - first * _BAR_CELLS // layers
        drawn.append(share.fill * max(cells, 1), share.colour)
    for share in found:
        drawn.append("\n" if drawn else "")
        drawn.append(f"{share.fill} ", share.colour).append(f"{share.node}: {share.work}")
    return drawn


def for_terminal(message: AnswerMessage, receipt: ReceiptLines, difference: str | None) -> Group:
    """Return an answer with its receipt as rich prints it."""
    said = [Text(printable(text, kept="\n"), style) for text, style in _said(message)]
    wrong = [Text(difference, "red")] if difference else []
    return Group(*said, Text(), bar(receipt), Text(cost(receipt), "dim"), *wrong)


def for_notebook(message: AnswerMessage, receipt: ReceiptLines, difference: str | None) -> str:
    """Return an answer with its receipt as HTML."""
    found = shares(receipt)
    said = "".join(
        f'<p style="white-space:pre-wrap{";opacity:0.6" * (style == "dim")}">{escape(text)}</p>'
        for text, style in _said(message)
    )
    spans = "".join(
        f'<span title="{escape(f"{share.node}: layers {start} to {end - 1}")}" '
        f'style="flex:{end - start};background:{share.colour}"></span>'
        for (start, end), share in _parts(found)
    )
    nodes = "".join(
        f'<div><span style="color:{share.colour}">■</span> {escape(f"{share.node}: {share.work}")}</div>'
        for share in found
    )
    wrong = f'<div style="color:#d55e00">{escape(difference)}</div>' if difference else ""
    drawn = f'<div style="display:flex;gap:1px;height:1em;max-width:40em">{spans}</div>'
    return f"<div>{said}{drawn}<small>{nodes}<div>{escape(cost(receipt))}</div>{wrong}</small></div>"


def cost(receipt: ReceiptLines) -> str:
    """Return what a job cost, in words."""
    tokens = f"{receipt.prompt_tokens} prompt + {receipt.completion_tokens} completion tokens"
    charged = hype_from_lamports(receipt.charged_lamports)
    return f"{tokens} x {receipt.num_layers} layers: {charged} HYPE ({printable(receipt.job_id)})"


def _parts(found: tuple[Share, ...]) -> list[tuple[tuple[int, int], Share]]:
    return sorted(((span, share) for share in found for span in share.spans), key=lambda part: part[0])


def _said(message: AnswerMessage) -> list[tuple[str, str]]:
    """Return the parts of an answer with their styles."""
    calls = [f"{call.function.name}({call.function.arguments})" for call in message.tool_calls or ()]
    parts = [(message.reasoning_content, "dim"), (message.content, ""), *((call, "bold") for call in calls)]
    return [(text, style) for text, style in parts if text]
