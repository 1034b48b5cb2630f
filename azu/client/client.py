"""The client: every call of the network's HTTP API, and how a wallet signs in."""

import os
import secrets
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel

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
    Results,
    SubmittedJob,
)
from azu.api.network import LeaveResponse, ModelStatusResponse, NetworkResponse, OfferResponse, PauseResponse
from azu.api.openai import AnswerMessage, ChatChoice, ModelLine, ModelList, TextChoice
from azu.api.receipts import ReceiptLines
from azu.client.generation import CHAT, TEXT, Generation
from azu.client.http import json_of, raise_for, translated, trusting
from azu.client.machine import DEFAULT_HOME, network_url, stored_credential, trust_at
from azu.client.parameters import ChatParameters, TextParameters
from azu.client.stream import AsyncStream
from azu.client.wire import waiting
from azu.clock import wall_clock_ms
from azu.errors import InternalError, Unauthenticated

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 5.0
_WITHDRAWAL_LIFE_S = 600
# One question, or the turns of a chat: as dictionaries, and the answers of before as they came.
Messages = str | Sequence[Mapping[str, Any] | AnswerMessage]


class AsyncClient:
    """A caller of a network's HTTP API, with one pool of connections; `async with` closes it at the end.

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

    _wire_with = staticmethod(waiting)

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
        platform: str | None = None,
    ) -> None:
        given = os.environ.get
        home = Path(given("AZU_HOME") or DEFAULT_HOME).expanduser()
        url = (base_url or given("AZU_URL") or network_url(home, given("AZU_HTTP_PORT"))).rstrip("/")
        if tls is None and (authority := given("AZU_TLS_CA")):
            tls = trusting(Path(authority).expanduser())
        if tls is None:
            # The authorities of the system take long to load, and a URL without TLS asks none.
            is_plain = url.startswith("http:")
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else trust_at(home, url)
        # The variable's key is that of the variable's network, and no other one hears it.
        is_of_variable = given("AZU_URL", url).rstrip("/") == url
        of_variable = given("AZU_API_KEY") if is_of_variable else None
        if api_key is None and (known := stored_credential(home, url)) is not None:
            api_key, platform = of_variable or known.api_key, platform or known.platform
        self._wire = self._wire_with(
            base_url=url,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            verify=True if tls is None else tls,
        )
        self._http = self._wire.http
        self._platform = platform
        self._use_key(of_variable if api_key is None else api_key)

    @property
    def url(self) -> str:
        """The network's URL, without a slash at its end."""
        return str(self._http.base_url).rstrip("/")

    @property
    def has_key(self) -> bool:
        """Whether the client sends an API key."""
        return "authorization" in self._http.headers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self, prompt: str | Sequence[int], *, model: str, **parameters: Unpack[TextParameters]
    ) -> Generation[TextChoice]:
        """Continue a prompt, a text or token ids, as it is."""
        async with self.stream(prompt, model=model, **parameters) as answer:
            return await answer.result()

    def stream(
        self, prompt: str | Sequence[int], *, model: str, **parameters: Unpack[TextParameters]
    ) -> AsyncStream[TextChoice]:
        """Continue a prompt, a text or token ids, as it is; the text comes as a stream."""
        return AsyncStream(self._wire, TEXT, {"model": model, "prompt": prompt, **parameters})

    async def chat(
        self, messages: Messages, *, model: str, **parameters: Unpack[ChatParameters]
    ) -> Generation[ChatChoice]:
        """Answer a question or a chat through the model's own template."""
        async with self.chat_stream(messages, model=model, **parameters) as answer:
            return await answer.result()

    def chat_stream(
        self, messages: Messages, *, model: str, **parameters: Unpack[ChatParameters]
    ) -> AsyncStream[ChatChoice]:
        """Answer a question or a chat through the model's own template; the text comes as a stream."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        sent = [turn.model_dump(mode="json") if isinstance(turn, BaseModel) else turn for turn in turns]
        return AsyncStream(self._wire, CHAT, {"model": model, "messages": sent, **parameters})

    async def quote(
        self,
        prompt: str | None = None,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tokens: int | None = None,
        max_tokens: int | None = None,
        n: int = 1,
    ) -> QuoteResponse:
        """Return the highest and the expected price of `n` answers to a prompt as it is, or to a chat.

        `tokens` is the number of the prompt's tokens, in place of the prompt.
        """
        asked = _given({}, prompt=prompt, messages=messages and list(messages), tokens=tokens)
        body = _given({"model": model, "n": n} | asked, max_tokens=max_tokens)
        return await self._post(QuoteResponse, "/v1/quote", body)

    async def login(
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
        from azu.auth.key_records import SECRET_BYTES, ApiKey, key_id_of, new_secret, secret_digest
        from azu.client.signing import sign_key, wallet_of

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
        platform = (await self.platform()).address
        body = _given(
            {"address": wallet.address, "key_sha256": digest, "label": label},
            expires_at_ms=asked.expires_at_ms,
            spend_limit_lamports=spend_limit_lamports,
        )
        challenge = await self._post(ChallengeResponse, "/v1/auth/challenge", body)
        asked = replace(asked, created_at_ms=challenge.created_at_ms, text=challenge.message)
        signature = sign_key(wallet, asked, platform, self.url)
        await self._post(NewKey, "/v1/auth/keys", {"nonce": challenge.nonce, "signature": signature})
        self._use_key(secret)
        return secret

    async def api_keys(self) -> list[KeyLine]:
        """Return the API keys of the key's address, in the order in which they were opened."""
        return list((await self._get(KeyList, "/v1/auth/keys")).data)

    async def revoke_key(self, key_id: str) -> None:
        """Make one of the API keys of the key's address invalid at once."""
        with translated():
            raise_for(await self._http.delete(f"/v1/auth/keys/{_part(key_id)}"))

    async def platform(self) -> Platform:
        """Return where deposits go; raises Unauthenticated for another platform than the known one."""
        shown = await self._get(Platform, "/v1/platform")
        if self._platform is not None and shown.address.lower() != self._platform.lower():
            from azu.auth.succession import platforms_of
            from azu.client.known_network import successions_of

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

    async def deposit(self, tx_hash: str, address: str) -> DepositState:
        """Have the network look for a transfer at once and credit it."""
        return await self._post(DepositState, "/deposit", {"tx_sig": tx_hash, "user_address": address})

    async def balance(self) -> BalanceResponse:
        """Return the balance of the key's address."""
        return await self._get(BalanceResponse, "/v1/balance")

    async def withdraw(
        self, wallet: "LocalAccount", lamports: int, *, life_s: int = _WITHDRAWAL_LIFE_S
    ) -> WithdrawalLine:
        """Have lamports sent back to the key's address; its wallet signs the withdrawal."""
        from azu.auth.signatures import Withdrawal, sign_withdrawal

        withdrawal = Withdrawal(
            address=wallet.address.lower(),
            lamports=lamports,
            nonce=time.time_ns(),
            expires_at_ms=wall_clock_ms() + 1000 * life_s,
        )
        signature = sign_withdrawal(wallet, withdrawal, (await self.platform()).address)
        body = {
            "lamports": lamports,
            "nonce": withdrawal.nonce,
            "expires_at_ms": withdrawal.expires_at_ms,
            "signature": signature,
        }
        return await self._post(WithdrawalLine, "/v1/withdrawals", body)

    async def withdrawal(self, nonce: int) -> WithdrawalLine:
        """Return how far a withdrawal is."""
        return await self._get(WithdrawalLine, f"/v1/withdrawals/{nonce}")

    async def claim_earnings(self, wallet: "LocalAccount") -> None:
        """Claim the earnings of the key's address; its wallet signs. Nothing is paid before that."""
        from azu.auth.signatures import sign_claim

        signature = sign_claim(wallet, (await self.platform()).address)
        await self._post(ClaimedEarnings, "/v1/earnings/claim", {"signature": signature})

    async def earnings(self, days: int | None = None) -> EarningsResponse:
        """Return what the key's address earned by lending, by the hour of the last `days` or of one day."""
        return await self._get(EarningsResponse, "/v1/earnings", **_given({}, days=days))

    async def submit(self, prompt: str, *, model: str, address: str, est_tokens: int) -> str:
        """Queue a prompt and return its job id."""
        body = {"user_address": address, "model_id": model, "prompt": prompt, "est_tokens": est_tokens}
        return (await self._post(SubmittedJob, "/submit", body)).job_id

    async def results(self, job_id: str) -> Results:
        """Return what a job has produced so far."""
        return await self._get(Results, f"/results/{_part(job_id)}")

    async def jobs(self, limit: int = 50, before: str | None = None) -> list[JobLine]:
        """Return the jobs of the key's address, newest first, or those that came before the job `before`."""
        return list((await self._get(JobList, "/v1/jobs", **_given({"limit": limit}, before=before))).data)

    async def dispute(self, job_id: str, wallet: "LocalAccount") -> DisputeState:
        """Have what a job paid out be held until the network's admin decides; the payer's wallet signs."""
        from azu.auth.signatures import sign_dispute

        body = {"signature": sign_dispute(wallet, job_id, (await self.platform()).address)}
        return await self._post(DisputeState, f"/v1/jobs/{_part(job_id)}/dispute", body)

    async def decision(self, job_id: str) -> DisputeState:
        """Return whether a job is disputed, and what the network's admin decided about it."""
        return await self._get(DisputeState, f"/v1/jobs/{_part(job_id)}/dispute")

    async def delete_job(self, job_id: str) -> str:
        """Remove an ended job's prompt and answer from the network and return its id; its receipt stays."""
        with translated():
            answer = json_of(await self._http.delete(f"/v1/jobs/{_part(job_id)}"))
            return read(DeletedJob, answer).deleted

    async def receipt(self, job_id: str) -> ReceiptLines:
        """Return what a job cost and which workers earned it."""
        return await self._get(ReceiptLines, f"/v1/receipts/{_part(job_id)}")

    async def signed_receipt(self, job_id: str) -> dict[str, Any]:
        """Return a receipt as the JSON that the platform signed, with `signer` and `signature`.

        `azu.auth.signatures.verify_receipt` checks it offline. The signature is None while no receipt
        is signed. The signature covers keys that this client does not know, so the JSON stays as it came.
        """
        with translated():
            document = json_of(await self._http.get(f"/v1/receipts/{_part(job_id)}"))
        if not isinstance(document, dict):
            raise InternalError("the receipt is no JSON object")
        return document

    async def network(self) -> NetworkResponse:
        """Return nodes and deployments, and what they do."""
        return await self._get(NetworkResponse, "/v1/network")

    async def leave(self, node: str) -> bool:
        """Have a node of the key's address give away what it holds; return True once it holds nothing."""
        return (await self._post(LeaveResponse, f"/v1/nodes/{_part(node)}/leave", {})).left

    async def offer(self, vram_bytes: int, memory_bytes_per_s: float, flops_per_s: float) -> OfferResponse:
        """Return what a machine of this memory and speed would hold and could earn; needs no key."""
        body = {
            "vram_bytes": vram_bytes, "memory_bytes_per_s": memory_bytes_per_s, "flops_per_s": flops_per_s
        }  # fmt: skip
        return await self._post(OfferResponse, "/v1/nodes/offer", body)

    async def pause(self, node: str) -> bool:
        """Pause a node of the key's address until `resume`; return True once it holds nothing."""
        return (await self._post(PauseResponse, f"/v1/nodes/{_part(node)}/pause", {})).empty

    async def resume(self, node: str) -> None:
        """Have a paused node lend again."""
        await self._post(PauseResponse, f"/v1/nodes/{_part(node)}/resume", {})

    async def models(self) -> list[ModelLine]:
        """Return the models that are built in or cut, with their prices."""
        return list((await self._get(ModelList, "/v1/models")).data)

    async def shard(self, model: str) -> ModelStatusResponse:
        """Have a model cut into shards; needs the admin key."""
        return await self._post(ModelStatusResponse, "/models/shard", {"model_id": model})

    async def healthy(self) -> bool:
        """Return whether the network serves prompts now."""
        try:
            return (await self._http.get("/health", timeout=_CONNECT_TIMEOUT_S)).status_code == 200
        except httpx.TransportError:
            return False

    def _use_key(self, api_key: str | None) -> None:
        if api_key:
            self._http.headers["authorization"] = f"Bearer {api_key}"

    async def _get(self, kind: type[Response], path: str, **query: Any) -> Response:
        with translated():
            return read(kind, json_of(await self._http.get(path, params=query)))

    async def _post(self, kind: type[Response], path: str, body: dict[str, Any]) -> Response:
        with translated():
            return read(kind, json_of(await self._http.post(path, json=body)))


def _given(body: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return body | {name: value for name, value in optional.items() if value is not None}


def _part(text: str) -> str:
    return quote(text, safe="")
