"""`azu books`: the process that keeps the books."""

from typing import Annotated

import typer


def books(
    terms: Annotated[str, typer.Option(help="By what the books reckon, as JSON.")],
    admission: Annotated[
        str | None, typer.Option(help="How nodes are admitted, as `azu up` writes it; without it none are.")
    ] = None,
) -> None:
    """Keep the books until stopped; the only process with rights on the ledger in Redis.

    The Redis is that of REDIS_HOST, REDIS_PORT and REDIS_PASSWORD, the platform that of HYPERLIQUID_ADDRESS.
    AZU_HOME has a file with their port and the secrets of their callers, a folder with old entries, and the
    key that signs receipts. `azu up` sets AZU_SIGNER_URL.
    """
    import asyncio
    import os

    from pydantic import TypeAdapter

    from azu.auth.enrolment import Enrolment
    from azu.auth.tickets import Admission
    from azu.config import Settings
    from azu.errors import ConfigurationError
    from azu.launch.membership import members_folder
    from azu.launch.processes import end_with_parent
    from azu.launch.sidecars import SIGNER_URL, books_access, successions_in
    from azu.logs import start_logging
    from azu.money.books import BooksTerms
    from azu.money.books_process import BooksConfig, run
    from azu.money.treasury.environment import take_variable

    end_with_parent()
    signer_url = take_variable(os.environ, SIGNER_URL)
    settings = Settings.from_environment()
    if not signer_url or settings.redis_url is None or settings.platform_address is None:
        raise ConfigurationError("the books need REDIS_HOST, HYPERLIQUID_ADDRESS and AZU_SIGNER_URL")
    access, password = books_access(settings.home), settings.redis_password
    hidden = [*access.secrets.values(), *([password.get_secret_value()] if password else [])]
    start_logging("books", hidden=hidden)
    enrolment = None
    if admission is not None:
        enrolment = Enrolment(members_folder(settings.home), Admission.from_json(admission))
    config = BooksConfig(
        settings.redis_url,
        settings.home / "ledger",
        settings.platform_address,
        successions_in(settings.home, settings.platform_address),
        TypeAdapter(BooksTerms).validate_json(terms),
        access,
        settings.home / "receipt-key.json",
        signer_url,
        enrolment,
    )
    asyncio.run(run(config, ready=lambda: print("books ready", flush=True)))  # noqa: T201
