from tests.money.treasury.conftest import devnet_server, world  # noqa: F401 - fixtures
