"""A job's receipt: what it cost, and which nodes ran it."""

from collections.abc import Mapping

from azu.api.base import ResponseModel
from azu.api.network import PieceLine


class ReceiptLines(ResponseModel):
    """What a job cost and which nodes ran it. `worker_lamports` is keyed by payout address.

    charged = platform + held + sum of workers. `held_lamports` is the part of the workers' shares whose owner
    is unknown. `prompt_tokens` and `completion_tokens` are those that are charged; `token_layers` is their
    sum times the layers, the unit of the price.
    """

    job_id: str
    address: str
    model_id: str
    revision: str
    prompt_tokens: int
    completion_tokens: int
    num_layers: int
    lamports_per_token_layer: int
    charged_lamports: int
    released_lamports: int
    platform_lamports: int
    worker_lamports: Mapping[str, int]
    transfer_id: str
    topology: tuple[PieceLine, ...]
    held_lamports: int = 0
    token_layers: int


class SignedReceipt(ReceiptLines):
    """A receipt with the platform's address, and the signature by the key that the platform certified.

    `key`, `certificate` and `signature` are null while no receipt is signed.
    """

    signer: str
    key: str | None
    certificate: str | None
    signature: str | None
