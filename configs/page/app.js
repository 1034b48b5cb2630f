// What is shown when: the view from the address, the key from this tab, the network each two seconds.

import { Fault, key, read } from "./api.js";
import * as chat from "./chat.js";
import { find, hype, say } from "./dom.js";
import * as network from "./network.js";
import * as receipt from "./receipt.js";

const PERIOD_MS = 2000;

async function look() {
  const healthy = await fetch("/health").then((answer) => answer.status, () => 0);
  const health = find("health");
  health.textContent = healthy === 200 ? "Up" : healthy ? "Starting" : "Not reached";
  health.className = healthy === 200 ? "alive" : "dead";
  if (!key.get()) return;
  try {
    network.show(await read("/v1/network"));
    say(find("network-fault"), "");
  } catch (error) {
    say(find("network-fault"), told(error));
  }
}

// Everything that the key opens and that does not change by itself.
async function open() {
  const given = Boolean(key.get());
  find("key-form").hidden = given;
  find("account").hidden = !given;
  if (!given) return chat.offer([]);
  try {
    await account();
    chat.offer((await read("/v1/models")).data);
    look();
  } catch (error) {
    if (error.status === 401) forget();
    say(find("chat-fault"), told(error));
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

function told(error) {
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
look();
setInterval(() => { if (!document.hidden) look(); }, PERIOD_MS);
