from tests.money.chain.conftest import bob as bob
from tests.money.chain.conftest import devnet as devnet
from tests.money.chain.conftest import devnet_server as devnet_server
