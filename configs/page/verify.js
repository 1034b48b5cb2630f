// Checks a receipt in this browser, as azu/auth/signatures.py does: nothing here believes the network.

import { recoverPublicKey } from "./vendor/noble/secp256k1.js";
import { keccak_256 } from "./vendor/noble/sha3.js";

const SIGNATURE = ["signer", "key", "certificate", "signature"];

// Amounts of lamports may be larger than what JavaScript's numbers hold exactly: they keep their digits.
const exact = (text) => JSON.parse(text, (_, value, context) => {
  if (typeof value !== "number" || Number.isSafeInteger(value)) return value;
  if (!JSON.rawJSON || !context?.source) throw new Error("this browser cannot read its numbers exactly");
  return JSON.rawJSON(context.source);
});

// Returns what is wrong with a receipt, given as the JSON text of its document; "" if all of it holds.
export function faultOf(text) {
  let receipt;
  try {
    receipt = exact(text);
  } catch (error) {
    return `It cannot be checked: ${error.message}`;
  }
  const { signer, key, certificate, signature } = receipt;
  if (![signer, key, certificate, signature].every((part) => typeof part === "string")) return "It is not signed: the network signs no receipt now. Ask again later.";
  const facts = Object.fromEntries(Object.entries(receipt).filter(([name]) => !SIGNATURE.includes(name)));
  if (signerOf(`azu receipt\n${canonical(facts)}`, signature) !== key.toLowerCase()) return `It was changed, or not signed by ${key}.`;
  const certified = `azu receipt key\nplatform: ${signer.toLowerCase()}\nkey: ${key.toLowerCase()}`;
  if (signerOf(certified, certificate) !== signer.toLowerCase()) return `${signer} did not certify the key that signed it.`;
  return sumFault(receipt);
}

function sumFault(receipt) {
  const number = (value) => BigInt(typeof value === "number" ? value : JSON.stringify(value));
  const paid = [receipt.platform_lamports, receipt.held_lamports, ...Object.values(receipt.worker_lamports)].map(number);
  if (paid.reduce((sum, one) => sum + one, 0n) !== number(receipt.charged_lamports)) return "Its parts are not what was charged.";
  const most = number(receipt.token_layers) * number(receipt.lamports_per_token_layer);
  return number(receipt.charged_lamports) > most ? "It charges more than its tokens cost." : "";
}

// The address, in lower case, that signed a text as wallets do (EIP-191); null for a malformed signature.
function signerOf(text, signature) {
  const bytes = Uint8Array.from(signature.slice(2).match(/../g) ?? [], (pair) => parseInt(pair, 16));
  if (bytes.length !== 65) return null;
  const content = new TextEncoder().encode(text);
  const head = new TextEncoder().encode(`\x19Ethereum Signed Message:\n${content.length}`);
  const hash = keccak_256(Uint8Array.of(...head, ...content));
  try {
    const recovery = bytes[64] >= 27 ? bytes[64] - 27 : bytes[64];
    const key = recoverPublicKey(Uint8Array.of(recovery, ...bytes.subarray(0, 64)), hash, { prehash: false, isCompressed: false });
    const address = keccak_256(key.subarray(1)).subarray(12);
    return `0x${Array.from(address, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  } catch {
    return null;
  }
}

// Python's json.dumps with sorted keys, without spaces, in ASCII.
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object" || JSON.isRawJSON?.(value)) return ascii(JSON.stringify(value));
  return `{${Object.keys(value).sort().map((name) => `${ascii(JSON.stringify(name))}:${canonical(value[name])}`).join(",")}}`;
}

const ascii = (text) => text.replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
