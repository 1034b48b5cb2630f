"""`azu receipt`: the receipt of a job, from the network, or checked offline from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from azu.cli.credentials import known_platforms, open_client
from azu.cli.output import AsJson, Exact, amount, show, unit
from azu.cli.prompt import DIFFERS, compared, receipt_panel

if TYPE_CHECKING:
    from azu.client import Client


def receipt(
    job_id: Annotated[str | None, typer.Argument(help="A job's id.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Check a receipt that `azu receipt JOB --json` printed, offline.")
    ] = None,
    platform: Annotated[
        str | None, typer.Option(help="The address that has to have signed it; else that of the network.")
    ] = None,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Show what a job cost and which workers earned it, signed by the platform; or check such a receipt."""
    from azu.errors import InvalidRequest

    if (job_id is None) == (verify is None):
        raise InvalidRequest("give either a job's id or --verify FILE")
    if job_id is not None:
        client = open_client()
        document = client.signed_receipt(job_id)
        found = _compared(document, client, job_id)
        if as_json and found.style == DIFFERS:
            typer.echo(found.plain, err=True)
        decided = _decision(client, job_id, exact)
        if as_json and decided:
            typer.echo(decided.plain, err=True)  # not in the document that the platform signed
        show(document, as_json, lambda shown: Group(_signed(shown, exact), found, *filter(None, [decided])))
        return
    assert verify is not None
    document = _read(verify)
    checked = document | {"signed_by": _checked(document, platform)}
    show(checked, as_json, lambda shown: _verified(shown, exact))


def _read(file: Path) -> dict[str, Any]:
    from azu.api.base import read
    from azu.api.receipts import ReceiptLines
    from azu.errors import InternalError, InvalidRequest
    from azu.files import read_json

    document = read_json(file)
    try:
        read(ReceiptLines, document)
    except InternalError as error:
        raise InvalidRequest(f"{file} is no receipt: {error.message}") from error
    assert isinstance(document, dict), "nothing else reads as a receipt"
    return document


def _checked(document: dict[str, Any], platform: str | None) -> str:
    """Return the address that signed a receipt; raises InvalidRequest unless it is the platform's."""
    from azu.addresses import parse_address
    from azu.auth.signatures import verify_receipt
    from azu.errors import InvalidRequest

    signer = verify_receipt(document)
    expected = (parse_address(platform, param="platform"),) if platform else known_platforms()
    if signer not in expected:
        raise InvalidRequest(f"{signer} signed this receipt; the platform is {expected[0]}", param="signer")
    return signer


def _compared(document: dict[str, Any], client: "Client", job_id: str) -> Text:
    """Return what the comparison with the answer's tokens found, which the network keeps for a day."""
    from azu.api.base import read
    from azu.api.receipts import ReceiptLines
    from azu.client.receipts import difference
    from azu.errors import AzuError

    receipt = read(ReceiptLines, document)
    try:
        received = sum(len(choice.token_ids) for choice in client.results(job_id).choices)
    except AzuError as error:
        return Text(f"not compared: {error.message}", "yellow")
    if not received and receipt.completion_tokens:
        return Text("not compared: the network no longer has the answer", "yellow")
    return compared(difference(receipt, received))


def _decision(client: "Client", job_id: str, exact: bool) -> Text:
    """Return what became of what the job paid out, empty where nothing did."""
    from azu.errors import AzuError

    try:
        found = client.decision(job_id)
    except AzuError as error:
        return Text(f"not known whether it was disputed or reversed: {error.message}", "yellow")
    match found.state:
        case "held":
            held = f"{amount(found.held_lamports, exact)} {unit(exact)}"
            return Text(f"disputed: {held} are held until the network's admin decides", "yellow")
        case "reversed":
            back = f"{amount(found.returned_lamports, exact)} {unit(exact)}"
            return Text(f"reversed: {back} went back to the payer", "yellow")
        case "dismissed":
            return Text("disputed and dismissed: those who earned it keep it", "dim")
        case _:
            return Text()


def _signed(document: dict[str, Any], exact: bool = False) -> Group:
    from azu.api.base import read
    from azu.api.receipts import ReceiptLines

    signed = Text(f"signed by {document['signer']}", "green")
    unsigned = Text("not signed: the network signs no receipt now; ask again later", "yellow")
    panel = receipt_panel(read(ReceiptLines, document), exact)
    return Group(panel, signed if document["signature"] else unsigned)


def _verified(document: dict[str, Any], exact: bool) -> Group:
    from azu.api.base import read
    from azu.api.receipts import ReceiptLines

    verdict = Text(f"✓ signed by the platform, {document['signed_by']}, and not changed since", "green")
    return Group(receipt_panel(read(ReceiptLines, document), exact), verdict)
