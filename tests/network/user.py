"""A user of the test network: a wallet, a key and perhaps a deposit."""

import hashlib
import secrets
from dataclasses import dataclass, replace

import httpx
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class User:
    """`http` carries the user's bearer key; `deposit_hash` is empty for a user without money."""

    url: str
    address: str
    account: LocalAccount
    api_key: str
    http: httpx.Client
    deposit_hash: str = ""

    def with_deposit(self, tx_hash: str) -> "User":
        """Return the user with the hash of a deposit."""
        return replace(self, deposit_hash=tx_hash)

    def balance(self) -> tuple[int, int]:
        """Return (available, reserved) lamports."""
        body = self.http.get("/v1/balance").raise_for_status().json()
        return body["available_lamports"], body["reserved_lamports"]

    def submit(self, prompt: str, *, est_tokens: object, model: str = "azu/tiny-dense") -> httpx.Response:
        """Submit a prompt without a template."""
        body = {"user_address": self.address, "model_id": model, "prompt": prompt, "est_tokens": est_tokens}
        return self.http.post("/submit", json=body)

    def results(self, job_id: str) -> dict[str, object]:
        """Return a job's current results."""
        body: dict[str, object] = self.http.get(f"/results/{job_id}").raise_for_status().json()
        return body


def log_in(url: str, label: str) -> User:
    """Make a wallet and open a key for it, as any client would."""
    account: LocalAccount = Account.create()
    api_key = f"azu-sk-{secrets.token_urlsafe(32)}"
    asked = {
        "address": account.address,
        "key_sha256": hashlib.sha256(api_key.encode()).hexdigest(),
        "label": label,
    }
    made = httpx.post(f"{url}/v1/auth/challenge", json=asked, timeout=30).raise_for_status().json()
    signed = account.sign_message(encode_defunct(text=made["message"]))
    body = {"nonce": made["nonce"], "signature": signed.signature.to_0x_hex()}
    opened = httpx.post(f"{url}/v1/auth/keys", json=body, timeout=30).raise_for_status().json()
    headers = {"authorization": f"Bearer {api_key}"}
    http = httpx.Client(base_url=url, timeout=_TIMEOUT_S, headers=headers)
    return User(url, opened["address"], account, api_key, http)
