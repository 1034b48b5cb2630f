// Which view is shown: it follows the address and this tab's key; the network is read every two seconds.

import * as account from "./account.js";
import { key, read, words } from "./api.js";
import * as chat from "./chat.js";
import * as chats from "./chats.js";
import { find, say } from "./dom.js";
import * as lend from "./lend.js";
import * as network from "./network.js";
import * as picture from "./picture.js";
import * as receipt from "./receipt.js";

const PERIOD_MS = 2000;
const VIEWS = ["chat", "network", "lend", "receipts", "account"];

async function refresh() {
  const healthy = await fetch("/health").then((answer) => answer.status, () => 0);
  const health = find("health");
  health.textContent = healthy === 200 ? "Up" : healthy ? "Starting" : "Not reached";
  health.className = healthy === 200 ? "alive" : "dead";
  await chat.look().catch((error) => say(find("chat-fault"), words(error)));
  if (!key.get() || !healthy) return;
  try {
    const found = await read("/v1/network");
    network.show(found);
    await lend.show(found);
    say(find("network-fault"), "");
  } catch (error) {
    // What is wrong with a key is said where the key is, and at the top that the network is not reached.
    if (error.status !== 401) say(find("network-fault"), error.status === 0 ? "" : words(error));
  }
}

// Shows what needs a key and changes only when the user acts.
async function open() {
  if (!key.get()) forgetShown();
  try {
    await account.show();
    chat.offer(key.get() ? (await read("/v1/models")).data : []);
    if (key.get()) await receipt.list();
  } catch (error) {
    if (error.status === 401) account.forget();
    say(find("key-fault"), words(error));
  }
  view();
}

function forgetShown() {
  picture.forget();
  for (const id of ["summary", "picture", "nodes", "models", "jobs", "receipt", "earned", "earned-by", "my-nodes"]) {
    find(id).replaceChildren();
    delete find(id).dataset.shown;
  }
}

function view() {
  const [name, jobId] = location.hash.slice(1).split("/");
  const chosen = VIEWS.includes(name) ? name : "chat";
  document.body.dataset.view = chosen;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!key.get()) return;
  if (chosen === "receipts" && jobId) receipt.show(decoded(jobId));
  if (chosen === "lend") refresh();
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

async function answered(isOver) {
  await chats.list();
  if (isOver && key.get()) await Promise.all([account.show(), receipt.list()]);
}

window.addEventListener("hashchange", view);
chat.start((isOver) => answered(isOver).catch((error) => say(find("chat-fault"), words(error))));
receipt.start();
picture.start();
account.start(open);
view();
await chats.start();
await open();
await refresh();
setInterval(() => { if (!document.hidden) refresh(); }, PERIOD_MS);
