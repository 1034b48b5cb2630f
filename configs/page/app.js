// Which view is shown: it follows the address and this tab's key; the network is read every two seconds.

import { Fault, key, read } from "./api.js";
import * as chat from "./chat.js";
import { find, hype, say } from "./dom.js";
import * as network from "./network.js";
import * as receipt from "./receipt.js";

const PERIOD_MS = 2000;

async function refresh() {
  const healthy = await fetch("/health").then((answer) => answer.status, () => 0);
  const health = find("health");
  health.textContent = healthy === 200 ? "Up" : healthy ? "Starting" : "Not reached";
  health.className = healthy === 200 ? "alive" : "dead";
  if (!key.get()) return;
  try {
    network.show(await read("/v1/network"));
    say(find("network-fault"), "");
  } catch (error) {
    say(find("network-fault"), sentence(error));
  }
}

// Shows what needs a key and changes only when the user acts.
async function open() {
  const given = Boolean(key.get());
  find("key-form").hidden = given;
  find("account").hidden = !given;
  if (!given) return chat.offer([]);
  try {
    await account();
    chat.offer((await read("/v1/models")).data);
    refresh();
  } catch (error) {
    if (error.status === 401) forget();
    say(find("chat-fault"), sentence(error));
  }
}

async function account() {
  const { available_lamports: available } = await read("/v1/balance");
  find("balance").textContent = hype(available);
  await receipt.list();
}

function forget() {
  key.forget();
  for (const id of ["summary", "nodes", "models", "jobs", "receipt"]) {
    find(id).replaceChildren();
    delete find(id).dataset.shown;
  }
  open();
  find("key").focus();
}

function sentence(error) {
  return error instanceof Fault ? error.message : `This page made a mistake: ${error.message}`;
}

function view() {
  const [name, jobId] = location.hash.slice(1).split("/");
  const chosen = ["chat", "network", "receipts"].includes(name) ? name : "chat";
  document.body.dataset.view = chosen;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (chosen === "receipts" && jobId && key.get()) receipt.show(decodeURIComponent(jobId));
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  say(find("chat-fault"), "");
  find("key").value = "";
  open().then(view);
});
find("forget").addEventListener("click", forget);
window.addEventListener("hashchange", view);
chat.start(open);
receipt.start();
view();
open().then(view);
refresh();
// The id in the command is what a wallet's owner compares with the one that `azu up` printed.
fetch("/v1/platform").then((answer) => answer.json()).then((shown) => {
  find("identity").textContent = `azu login ${location.origin}#${shown.network_id}`;
  // It listens on the loopback of the head alone.
  find("dashboard").hidden = !shown.dashboard_url || !["127.0.0.1", "localhost"].includes(location.hostname);
  if (shown.dashboard_url) find("dashboard").href = shown.dashboard_url;
}, () => {});
setInterval(() => { if (!document.hidden) refresh(); }, PERIOD_MS);
