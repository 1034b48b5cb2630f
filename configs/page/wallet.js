// Wallets of this browser: each says its name (EIP-6963) and takes requests (EIP-1193).

import { Fault, read } from "./api.js";
import { sha256 } from "./vendor/noble/sha2.js";

const KEY_LIFE_MS = 30 * 86_400_000;
const DECLINED = 4001;

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

async function asked(provider, method, params) {
  try {
    return await provider.request({ method, params });
  } catch (error) {
    if (error?.code === DECLINED) throw new Fault("You declined in the wallet; nothing was signed.");
    throw new Fault(`The wallet says: ${String(error?.message ?? error).slice(0, 200)}`);
  }
}

const utf8 = (text) => new TextEncoder().encode(text);
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const base64url = (bytes) => btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
