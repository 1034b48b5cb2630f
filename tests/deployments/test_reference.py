"""docs/api.md and the document that it is written from."""

from pathlib import Path

from deployments.ingress import contract
from deployments.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_what_the_schema_says_now() -> None:
    assert PAGE.read_text() == reference(contract()), "run: python -m deployments.reference > docs/api.md"


def test_every_operation_documents_a_body_its_errors_and_its_caller() -> None:
    untyped = []
    for path, methods in contract()["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"].get("content", {})
            schemas = [body.get("schema") for body in content.values()]
            texts = [kind == "text/plain" or "$ref" in str(body) for kind, body in content.items()]
            if not content or not all(schemas) or not all(texts):
                untyped.append(f"{method} {path}")
            assert {"4XX", "5XX"} <= operation["responses"].keys()
            assert operation["description"]
    assert untyped == []


def test_every_reference_in_the_document_leads_to_a_body() -> None:
    document = contract()
    known = document["components"]["schemas"].keys()

    assert references(document["paths"]) | references(document["components"]) == known


def references(value: object) -> set[str]:
    """Return the names of the schemas that a part of the document refers to."""
    if isinstance(value, dict):
        here = {value["$ref"].rpartition("/")[2]} if isinstance(value.get("$ref"), str) else set()
        return here.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()
