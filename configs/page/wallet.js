// Wallets of this browser: each says its name (EIP-6963) and takes requests (EIP-1193). A wallet shows its owner what it
// signs (EIP-712): a login, a claim, a transfer of HYPE on the chain.

import { Fault, read } from "./api.js";
import { sha256 } from "./vendor/noble/sha2.js";

const KEY_LIFE_MS = 30 * 86_400_000;
const DECLINED = 4001;
const CHAIN_MS = 10_000;
// The chain shows a transfer after some seconds.
const SHOWN_MS = 30_000;
const LOOK_MS = 1000;
const CLOCK_SLACK_MS = 60_000;
const NO_CONTRACT = `0x${"0".repeat(40)}`;
const SEND_ASSET = [
  ["hyperliquidChain", "string"], ["destination", "string"], ["sourceDex", "string"], ["destinationDex", "string"],
  ["token", "string"], ["amount", "string"], ["fromSubAccount", "string"], ["nonce", "uint64"],
];

// Calls back with all wallets that have announced themselves, each { name, provider }, whenever there are more.
export function findWallets(call) {
  const found = new Map();
  const tell = () => call(found.size || !globalThis.ethereum ? [...found.values()] : [{ name: "browser wallet", provider: globalThis.ethereum }]);
  addEventListener("eip6963:announceProvider", ({ detail: { info, provider } }) => {
    found.set(info.uuid, { name: String(info.name).slice(0, 40), provider });
    tell();
  });
  dispatchEvent(new Event("eip6963:requestProvider"));
  tell();
}

// Opens a key for the wallet's address; returns { secret, key_id, address }.
export async function signIn(provider) {
  const [address] = await asked(provider, "eth_requestAccounts", []);
  if (!address) throw new Fault("The wallet showed no address.");
  const secret = `azu-sk-${base64url(crypto.getRandomValues(new Uint8Array(32)))}`;
  const body = {
    address, key_sha256: hex(sha256(utf8(secret))), label: "browser", expires_at_ms: Date.now() + KEY_LIFE_MS,
  };
  const { nonce, message } = await read("/v1/auth/challenge", { body });
  // As hex: wallets guess whether another text is meant as hex.
  const signature = await asked(provider, "personal_sign", [`0x${hex(utf8(message))}`, address]);
  return { secret, ...await read("/v1/auth/keys", { body: { nonce, signature } }) };
}

// Signs that an account's own address shall be paid what it earns; the account is the wallet's.
export async function claim(provider, account, platform) {
  await sameAccount(provider, account);
  const domain = { name: "azu", version: "1", verifyingContract: platform };
  const signature = await typed(provider, account, domain, "PayoutAddress", [["account", "address"]], { account });
  return read("/v1/earnings/claim", { body: { signature } });
}

// Moves lamports from the wallet's spot account to the platform; returns the hash of the transfer.
export async function deposit(provider, account, lamports, { address, chain_url, hype_token, is_mainnet }) {
  await sameAccount(provider, account);
  // Wallets sign only for the chain that they show; Hyperliquid takes a signature of any.
  const signatureChainId = await asked(provider, "eth_chainId", []);
  const nonce = Date.now();
  const message = {
    hyperliquidChain: is_mainnet ? "Mainnet" : "Testnet", destination: address.toLowerCase(), sourceDex: "spot",
    destinationDex: "spot", token: hype_token, amount: decimal(lamports), fromSubAccount: "", nonce,
  };
  const domain = { name: "HyperliquidSignTransaction", version: "1", chainId: Number(signatureChainId), verifyingContract: NO_CONTRACT };
  const signed = await typed(provider, account, domain, "HyperliquidTransaction:SendAsset", SEND_ASSET, message);
  const signature = { r: signed.slice(0, 66), s: `0x${signed.slice(66, 130)}`, v: parseInt(signed.slice(130, 132), 16) };
  if (signature.v < 27) signature.v += 27;
  const action = { type: "sendAsset", signatureChainId, ...message };
  const body = { action, nonce, signature, vaultAddress: null, expiresAfter: null };
  // Without an answer the transfer may be done all the same: only the chain's ledger says.
  const answer = await chain(chain_url, "exchange", body).catch(() => null);
  if (answer?.status === "err") throw new Fault(`The chain refused the transfer: ${String(answer.response).slice(0, 200)}`);
  const query = { type: "userNonFundingLedgerUpdates", user: address, startTime: nonce - CLOCK_SLACK_MS };
  for (const until = performance.now() + SHOWN_MS; performance.now() < until;) {
    const rows = await chain(chain_url, "info", query).catch(() => []);
    const row = rows.find(({ delta }) => delta.nonce === nonce && delta.user?.toLowerCase() === account);
    if (row) return row.hash;
    await new Promise((later) => setTimeout(later, LOOK_MS));
  }
  throw new Fault("The chain has not shown the transfer yet. Look into your wallet before you send again: azu finds a transfer by itself.");
}

async function chain(url, path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await fetch(`${url}/${path}`, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(CHAIN_MS) });
  return answer.json();
}

async function sameAccount(provider, account) {
  const [address] = await asked(provider, "eth_requestAccounts", []);
  if (address?.toLowerCase() !== account) throw new Fault(`This key is of the account ${account}; the wallet shows ${address ?? "none"}.`);
}

function typed(provider, account, domain, primaryType, fields, message) {
  const of = { name: "string", version: "string", chainId: "uint256", verifyingContract: "address" };
  const listed = (pairs) => pairs.map(([name, type]) => ({ name, type }));
  const types = { EIP712Domain: listed(Object.keys(domain).map((name) => [name, of[name]])), [primaryType]: listed(fields) };
  return asked(provider, "eth_signTypedData_v4", [account, JSON.stringify({ domain, types, primaryType, message })]);
}

async function asked(provider, method, params) {
  try {
    return await provider.request({ method, params });
  } catch (error) {
    if (error?.code === DECLINED) throw new Fault("You declined in the wallet; nothing was signed.");
    throw new Fault(`The wallet says: ${String(error?.message ?? error).slice(0, 200)}`);
  }
}

const decimal = (lamports) => `${Math.floor(lamports / 1e8)}.${String(lamports % 1e8).padStart(8, "0")}`.replace(/\.?0+$/, "");
const utf8 = (text) => new TextEncoder().encode(text);
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const base64url = (bytes) => btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
