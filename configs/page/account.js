// This tab's key: where it comes from, what its account holds, where deposits go.

import { stopAll } from "./answer.js";
import { Fault, key, read, words } from "./api.js";
import { button, copyButton, find, hype, make, say } from "./dom.js";
import { claim, deposit, findWallets, signIn } from "./wallet.js";

// The id of a key that this page opened itself: it is made invalid when the user signs out.
const OWN = "azu-key-id";
// The platform's address that this browser knows: another one is told before anything is sent to it.
const PLATFORM = "azu-platform";
const AMOUNT = /^(\d{1,7})(?:\.(\d{1,8}))?$/;

let onChange = () => {};

export function start(changed) {
  onChange = changed;
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    use(find("key").value.trim());
    find("key").value = "";
  });
  find("forget").addEventListener("click", async () => {
    // With the key, which is made invalid then.
    await stopAll();
    const own = sessionStorage.getItem(OWN);
    if (own) await read(`/v1/auth/keys/${own}`, { method: "DELETE" }).catch(() => {});
    forget();
  });
  find("deposit-form").addEventListener("submit", (event) => {
    event.preventDefault();
    look(find("transfer").value.trim());
  });
  find("send-form").addEventListener("submit", (event) => event.preventDefault());
  findWallets((wallets) => {
    find("wallets").replaceChildren(...wallets.map(({ name, provider }) =>
      button(`Sign in with ${name}`, (event) => open(event.target, provider), { className: "main" })));
    find("no-wallet").hidden = wallets.length > 0;
    find("send-form").hidden = wallets.length === 0;
    find("senders").replaceChildren(...wallets.map(({ name, provider }) =>
      button(`Send with ${name}`, (event) => send(event.target, provider))));
    find("claimers").replaceChildren(...wallets.map(({ name, provider }) =>
      button(`Claim with ${name}`, (event) => sign(event.target, provider))));
  });
  platform();
}

export function forget() {
  // Their jobs are ended with the key that they have.
  stopAll();
  key.forget();
  sessionStorage.removeItem(OWN);
  onChange();
  find("key").focus();
}

// Shows what the account holds; raises Fault.
export async function show() {
  const given = Boolean(key.get());
  document.body.dataset.key = given ? "given" : "none";
  if (!given) return;
  const found = await read("/v1/balance");
  find("balance").textContent = hype(found.available_lamports);
  find("holds").replaceChildren(...[
    ["Address", found.address],
    ["To spend", hype(found.available_lamports)],
    ["Set aside for jobs that run", hype(found.reserved_lamports)],
    ["On its way to your wallet", hype(found.withdrawing_lamports)],
  ].flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { className: "id", textContent: value })]));
  document.body.dataset.money = found.available_lamports > 0 ? "some" : "none";
}

function use(secret, own = "") {
  key.set(secret);
  if (own) sessionStorage.setItem(OWN, own);
  say(find("key-fault"), "");
  onChange();
}

async function open(pressed, provider) {
  pressed.disabled = true;
  say(find("key-fault"), "");
  try {
    const { secret, key_id: own } = await signIn(provider);
    use(secret, own);
  } catch (error) {
    say(find("key-fault"), words(error));
  }
  pressed.disabled = false;
}

// Sends HYPE with the wallet to the platform that this browser knows, and has azu look for it.
async function send(pressed, provider) {
  const told = find("deposit-told");
  const [, whole, part = ""] = AMOUNT.exec(find("amount").value.trim()) ?? [];
  const lamports = Number((whole ?? "0") + part.padEnd(8, "0"));
  if (!lamports) {
    say(told, "Say how many HYPE, for example 0.5.");
    return;
  }
  pressed.disabled = true;
  say(told, "The wallet asks you.");
  try {
    const [platform, { address }] = await Promise.all([read("/v1/platform"), read("/v1/balance")]);
    checkPlatform(platform.address);
    const hash = await deposit(provider, address, lamports, platform);
    find("transfer").value = hash;
    await look(hash);
  } catch (error) {
    say(told, words(error));
  }
  pressed.disabled = false;
}

function checkPlatform(address) {
  const known = localStorage.getItem(PLATFORM) ?? address;
  localStorage.setItem(PLATFORM, known);
  if (known === address) return;
  const use = () => {
    localStorage.setItem(PLATFORM, address);
    say(find("deposit-told"), "");
  };
  setTimeout(() => find("deposit-told").append(" ", button("It is right", use, { className: "small" })));
  throw new Fault(`The network's address was ${known} in this browser and is ${address} now. Nothing was sent: ask its owner.`);
}

async function sign(pressed, provider) {
  const told = find("claim-told");
  pressed.disabled = true;
  say(told, "The wallet asks you.");
  try {
    const [platform, { address }] = await Promise.all([read("/v1/platform"), read("/v1/balance")]);
    await claim(provider, address, platform.address);
    say(told, "Claimed: what you earn is sent to this address.");
    onChange();
  } catch (error) {
    say(told, words(error));
  }
  pressed.disabled = false;
}

async function look(tx_sig) {
  const told = find("deposit-told");
  say(told, "Looking for the transfer.");
  try {
    const { address } = await read("/v1/balance");
    const found = await read("/deposit", { body: { tx_sig, user_address: address } });
    say(told, found.status === "credited" ? `${hype(found.lamports)} are in your account.` :
      "The chain does not show this transfer yet; azu goes on looking.");
    if (found.status === "credited") onChange();
  } catch (error) {
    say(told, words(error));
  }
}

async function platform() {
  try {
    const found = await read("/v1/platform");
    for (const place of document.querySelectorAll(".deposit-address")) {
      place.replaceChildren(make("code", { textContent: found.address }), copyButton(() => found.address, "Copy the deposit address"));
    }
    find("chain").textContent = new URL(found.chain_url).host;
    // It listens on the loopback of the head alone.
    find("dashboard").hidden = !found.dashboard_url || !["127.0.0.1", "localhost"].includes(location.hostname);
    if (found.dashboard_url) find("dashboard").href = found.dashboard_url;
    const command = `azu login ${location.origin}#${found.network_id}`;
    for (const place of document.querySelectorAll(".login-command")) {
      place.replaceChildren(make("code", { textContent: command }), copyButton(() => command, "Copy the command"));
    }
  } catch (error) {
    if (!(error instanceof Fault)) throw error;
  }
}
