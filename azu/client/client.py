"""The client: one class over the network's HTTP API, and how a wallet signs in."""

import os
import secrets
import ssl
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from azu.api.accounts import (
    BalanceResponse,
    ChallengeResponse,
    ClaimedEarnings,
    DepositState,
    EarningsResponse,
    KeyLine,
    KeyList,
    NewKey,
    Platform,
    WithdrawalLine,
)
from azu.api.base import Response, read
from azu.api.jobs import (
    DeletedJob,
    DisputeState,
    JobLine,
    JobList,
    QuoteResponse,
    ReceiptLines,
    Results,
    SubmittedJob,
)
from azu.api.network import (
    LeaveResponse,
    ModelStatusResponse,
    NetworkResponse,
    OfferResponse,
    PauseResponse,
)
from azu.api.openai import ModelLine, ModelList
from azu.auth.key_records import (
    SECRET_BYTES,
    ApiKey,
    domain_of,
    is_key_text,
    key_id_of,
    new_secret,
    secret_digest,
)
from azu.auth.signatures import Withdrawal, sign_claim, sign_dispute, sign_withdrawal
from azu.auth.succession import platforms_of
from azu.client.http import json_of, raise_for, translated, trusting
from azu.client.known_network import successions_of
from azu.client.machine import DEFAULT_HOME, network_url, stored_credential, trust_at
from azu.client.stream import Generation, Stream
from azu.clock import wall_clock_ms
from azu.errors import InternalError, InvalidRequest, Unauthenticated

_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 5.0
_WITHDRAWAL_LIFE_S = 600

Message = dict[str, str]


class Client:
    """A caller of a network's HTTP API.

    `base_url` and `api_key` default to AZU_URL and AZU_API_KEY; without these the client uses the network
    that runs out of AZU_HOME, or else that of the last `azu login`, and the key of the login there. An empty
    `api_key` is no key. `tls` replaces the trusted certificates: those in the file AZU_TLS_CA beside
    public ones, or else those of the authority that this machine knows. `platform` is the platform's address
    that the caller knows, without an `api_key` by default that of the login: for a network that shows another
    one the client signs and sends nothing.

    Every method raises the AzuError that the network answered with, Unavailable when the network cannot be
    reached, DeadlineExceeded when it does not answer in time, and InternalError for an answer of another
    shape.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = _TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
        platform: str | None = None,
    ) -> None:
        given = os.environ.get
        home = Path(given("AZU_HOME") or DEFAULT_HOME).expanduser()
        url = (base_url or given("AZU_URL") or network_url(home, given("AZU_HTTP_PORT"))).rstrip("/")
        if tls is None and (authority := given("AZU_TLS_CA")):
            tls = trusting(Path(authority).expanduser())
        if tls is None and url.startswith("https:"):
            tls = trust_at(home, url)
        if api_key is None and (known := stored_credential(home, url)) is not None:
            api_key, platform = given("AZU_API_KEY") or known.api_key, platform or known.platform
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            verify=True if tls is None else tls,
        )
        self._platform = platform
        self._use_key(given("AZU_API_KEY") if api_key is None else api_key)

    @property
    def url(self) -> str:
        """The network's URL, without a slash at its end."""
        return str(self._http.base_url).rstrip("/")

    @property
    def has_key(self) -> bool:
        """Whether the client sends an API key."""
        return "authorization" in self._http.headers

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(
        self, prompt: str, *, model: str, max_tokens: int | None = None, **sampling: Any
    ) -> Generation:
        """Continue a prompt as it is; `sampling` takes the parameters of OpenAI's API by name."""
        return self.stream(prompt, model=model, max_tokens=max_tokens, **sampling).result()

    def stream(self, prompt: str, *, model: str, max_tokens: int | None = None, **sampling: Any) -> Stream:
        """Continue a prompt as it is; the text comes as a stream."""
        body = {"model": model, "prompt": prompt, **sampling}
        return Stream(self._http, "/v1/completions", _given(body, max_tokens=max_tokens))

    def chat(self, messages: Sequence[Message], *, model: str, **sampling: Any) -> Generation:
        """Answer a chat through the model's own template."""
        return self.chat_stream(messages, model=model, **sampling).result()

    def chat_stream(self, messages: Sequence[Message], *, model: str, **sampling: Any) -> Stream:
        """Answer a chat through the model's own template; the text comes as a stream."""
        return Stream(
            self._http, "/v1/chat/completions", {"model": model, "messages": list(messages), **sampling}
        )

    def quote(
        self,
        prompt: str | None = None,
        *,
        model: str,
        tokens: int | None = None,
        max_tokens: int | None = None,
        n: int = 1,
    ) -> QuoteResponse:
        """Return the highest and the expected price of `n` answers to a prompt as it is.

        `tokens` is the number of the prompt's tokens, in place of the prompt.
        """
        body = _given({"model": model, "n": n}, prompt=prompt, tokens=tokens, max_tokens=max_tokens)
        return self._post(QuoteResponse, "/v1/quote", body)

    def login(
        self,
        key: "str | LocalAccount",
        *,
        label: str = "",
        expires_in_s: int | None = None,
        spend_limit_lamports: int | None = None,
    ) -> str:
        """Open an API key with a wallet's signature, use the API key from now on and return it.

        `key` is the wallet or its private key in hex; it never leaves this process. The API key is made here,
        and the network gets its hash. One that expires or has a spend limit may only revoke itself.
        """
        wallet, secret = wallet_of(key), new_secret(secrets.token_bytes(SECRET_BYTES))
        digest, now_ms = secret_digest(secret), wall_clock_ms()
        asked = ApiKey(
            key_id=key_id_of(digest),
            digest=digest,
            address=wallet.address.lower(),
            label=label,
            created_at_ms=now_ms,
            expires_at_ms=None if expires_in_s is None else now_ms + 1000 * expires_in_s,
            spend_limit_lamports=spend_limit_lamports,
        )
        platform = self.platform().address
        body = _given(
            {"address": wallet.address, "key_sha256": digest, "label": label},
            expires_at_ms=asked.expires_at_ms,
            spend_limit_lamports=spend_limit_lamports,
        )
        challenge = self._post(ChallengeResponse, "/v1/auth/challenge", body)
        asked = replace(asked, created_at_ms=challenge.created_at_ms, text=challenge.message)
        signature = sign_key(wallet, asked, platform, self.url)
        self._post(NewKey, "/v1/auth/keys", {"nonce": challenge.nonce, "signature": signature})
        self._use_key(secret)
        return secret

    def api_keys(self) -> list[KeyLine]:
        """Return the API keys of the key's address, in the order in which they were opened."""
        return list(self._get(KeyList, "/v1/auth/keys").data)

    def revoke_key(self, key_id: str) -> None:
        """Make one of the API keys of the key's address invalid at once."""
        with translated():
            raise_for(self._http.delete(f"/v1/auth/keys/{key_id}"))

    def platform(self) -> Platform:
        """Return where deposits go; raises Unauthenticated for another platform than the known one."""
        shown = self._get(Platform, "/v1/platform")
        if self._platform is not None and shown.address.lower() != self._platform.lower():
            if self._platform.lower() in platforms_of(shown.address.lower(), successions_of(shown)):
                raise Unauthenticated(
                    f"the platform {self._platform} is {shown.address} now, and its old key has signed that: "
                    "`azu login` again takes it over",
                    code="platform_replaced",
                )
            raise Unauthenticated(
                f"the network shows the platform {shown.address}; the one that you know is {self._platform}"
            )
        return shown

    def deposit(self, tx_hash: str, address: str) -> DepositState:
        """Have the network look for a transfer at once and credit it."""
        return self._post(DepositState, "/deposit", {"tx_sig": tx_hash, "user_address": address})

    def balance(self) -> BalanceResponse:
        """Return the balance of the key's address."""
        return self._get(BalanceResponse, "/v1/balance")

    def withdraw(
        self, wallet: "LocalAccount", lamports: int, *, life_s: int = _WITHDRAWAL_LIFE_S
    ) -> WithdrawalLine:
        """Have lamports sent back to the key's address; its wallet signs the withdrawal."""
        withdrawal = Withdrawal(
            address=wallet.address.lower(),
            lamports=lamports,
            nonce=time.time_ns(),
            expires_at_ms=wall_clock_ms() + 1000 * life_s,
        )
        signature = sign_withdrawal(wallet, withdrawal, self.platform().address)
        body = {
            "lamports": lamports,
            "nonce": withdrawal.nonce,
            "expires_at_ms": withdrawal.expires_at_ms,
            "signature": signature,
        }
        return self._post(WithdrawalLine, "/v1/withdrawals", body)

    def withdrawal(self, nonce: int) -> WithdrawalLine:
        """Return how far a withdrawal is."""
        return self._get(WithdrawalLine, f"/v1/withdrawals/{nonce}")

    def claim_earnings(self, wallet: "LocalAccount") -> None:
        """Claim the earnings of the key's address; its wallet signs. Nothing is paid before that."""
        signature = sign_claim(wallet, self.platform().address)
        self._post(ClaimedEarnings, "/v1/earnings/claim", {"signature": signature})

    def earnings(self) -> EarningsResponse:
        """Return what the key's address earned by lending."""
        return self._get(EarningsResponse, "/v1/earnings")

    def submit(self, prompt: str, *, model: str, address: str, est_tokens: int) -> str:
        """Queue a prompt and return its job id."""
        body = {"user_address": address, "model_id": model, "prompt": prompt, "est_tokens": est_tokens}
        return self._post(SubmittedJob, "/submit", body).job_id

    def results(self, job_id: str) -> Results:
        """Return what a job has produced so far."""
        return self._get(Results, f"/results/{job_id}")

    def jobs(self, limit: int = 50) -> list[JobLine]:
        """Return the jobs of the key's address, newest first."""
        return list(self._get(JobList, "/v1/jobs", limit=limit).data)

    def dispute(self, job_id: str, wallet: "LocalAccount") -> DisputeState:
        """Have what a job paid out be held until the network's admin decides; the payer's wallet signs."""
        body = {"signature": sign_dispute(wallet, job_id, self.platform().address)}
        return self._post(DisputeState, f"/v1/jobs/{quote(job_id, safe='')}/dispute", body)

    def decision(self, job_id: str) -> DisputeState:
        """Return whether a job is disputed, and what the network's admin decided about it."""
        return self._get(DisputeState, f"/v1/jobs/{quote(job_id, safe='')}/dispute")

    def delete_job(self, job_id: str) -> str:
        """Remove an ended job's prompt and answer from the network and return its id; its receipt stays."""
        with translated():
            answer = json_of(self._http.delete(f"/v1/jobs/{quote(job_id, safe='')}"))
            return read(DeletedJob, answer).deleted

    def receipt(self, job_id: str) -> ReceiptLines:
        """Return what a job cost and which workers earned it."""
        return self._get(ReceiptLines, f"/v1/receipts/{job_id}")

    def signed_receipt(self, job_id: str) -> dict[str, Any]:
        """Return a receipt as the JSON that the platform signed, with `signer` and `signature`.

        `azu.auth.signatures.verify_receipt` checks it offline. The signature is None while no receipt
        is signed. The signature covers keys that this client does not know, so the JSON stays as it came.
        """
        with translated():
            document = json_of(self._http.get(f"/v1/receipts/{job_id}"))
        if not isinstance(document, dict):
            raise InternalError("the receipt is no JSON object")
        return document

    def network(self) -> NetworkResponse:
        """Return nodes and deployments, and what they do."""
        return self._get(NetworkResponse, "/v1/network")

    def leave(self, node: str) -> bool:
        """Have a node of the key's address give away what it holds; return True once it holds nothing."""
        return self._post(LeaveResponse, f"/v1/nodes/{quote(node, safe='')}/leave", {}).left

    def offer(self, vram_bytes: int, memory_bytes_per_s: float, flops_per_s: float) -> OfferResponse:
        """Return what a machine of this memory and speed would hold and could earn; needs no key."""
        body = {
            "vram_bytes": vram_bytes, "memory_bytes_per_s": memory_bytes_per_s, "flops_per_s": flops_per_s
        }  # fmt: skip
        return self._post(OfferResponse, "/v1/nodes/offer", body)

    def pause(self, node: str) -> bool:
        """Pause a node of the key's address until `resume`; return True once it holds nothing."""
        return self._post(PauseResponse, f"/v1/nodes/{quote(node, safe='')}/pause", {}).empty

    def resume(self, node: str) -> None:
        """Have a paused node lend again."""
        self._post(PauseResponse, f"/v1/nodes/{quote(node, safe='')}/resume", {})

    def models(self) -> list[ModelLine]:
        """Return the models that are built in or cut, with their prices."""
        return list(self._get(ModelList, "/v1/models").data)

    def shard(self, model: str) -> ModelStatusResponse:
        """Have a model cut into shards; needs the admin key."""
        return self._post(ModelStatusResponse, "/models/shard", {"model_id": model})

    def healthy(self) -> bool:
        """Return whether the network serves prompts now."""
        try:
            return self._http.get("/health", timeout=_CONNECT_TIMEOUT_S).status_code == 200
        except httpx.TransportError:
            return False

    def _use_key(self, api_key: str | None) -> None:
        if api_key:
            self._http.headers["authorization"] = f"Bearer {api_key}"

    def _get(self, kind: type[Response], path: str, **query: Any) -> Response:
        with translated():
            return read(kind, json_of(self._http.get(path, params=query)))

    def _post(self, kind: type[Response], path: str, body: dict[str, Any]) -> Response:
        with translated():
            return read(kind, json_of(self._http.post(path, json=body)))


def _given(body: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return body | {name: value for name, value in optional.items() if value is not None}


def wallet_of(key: str | LocalAccount) -> LocalAccount:
    """Return the wallet of a private key in hex, or the wallet itself."""
    if isinstance(key, LocalAccount):
        return key
    try:
        wallet: LocalAccount = Account.from_key(key)
    except Exception:
        # The library's message may quote the key, so azu does not chain it.
        raise InvalidRequest("this is no private key", param="private_key") from None
    return wallet


def sign_key(wallet: LocalAccount, key: ApiKey, platform: str, url: str) -> str:
    """Sign a key's text as wallets do (EIP-191) and return the signature in hex.

    Raises InvalidRequest for a text that does not open this very key at the platform, or that is not of the
    network at `url`: another network could open a key, or a key with other limits, with the signature.
    """
    if not is_key_text(key.text, key, platform):
        raise InvalidRequest("the network sent another text to sign than the one that opens this key")
    domain, here = domain_of(key.text), urlsplit(url).netloc
    if _loopback_as_one(domain) != _loopback_as_one(here):
        raise InvalidRequest(
            f"the network at {here} sent a sign-in for {domain}: log in at that address if you know it, else "
            f"its owner has to set AZU_DOMAIN to {here}"
        )
    signature: str = wallet.sign_message(encode_defunct(text=key.text)).signature.to_0x_hex()
    return signature


def _loopback_as_one(netloc: str) -> str:
    host, colon, port = netloc.lower().rpartition(":")
    return f"127.0.0.1{colon}{port}" if host == "localhost" else netloc.lower()
