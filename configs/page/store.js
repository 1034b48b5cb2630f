// Conversations in this browser (IndexedDB); where it has none, they last as long as the page.

import { isAnswering } from "./conversation.js";

const STORE = "chats";
// An answer is kept so often while it grows. Where tabs cannot ask for each other (without TLS), a tab whose
// answer was not kept for the longer time counts as closed: a stream is never silent for so long.
export const BEAT_MS = 1000;
const CLOSED_MS = 30 * BEAT_MS;

// Another tab has changed or removed the conversation meanwhile.
export class Changed extends Error {}
export class Full extends Error {}

const memory = new Map();
const others = "BroadcastChannel" in globalThis ? new BroadcastChannel("azu-chats") : null;
let opened = null;

export const isLasting = async () => Boolean(await database());

export async function all() {
  const found = await request("readonly", (chats) => chats.getAll()) ?? [...memory.values()].map(structuredClone);
  return found.sort((a, b) => b.changed_ms - a.changed_ms);
}

export const get = async (id) => await request("readonly", (chats) => chats.get(id)) ?? structuredClone(memory.get(id));

// Keeps a conversation; raises Changed or Full, and then what is kept stays as it was.
export async function keep(conversation) {
  if (!await database()) return memory.set(conversation.id, structuredClone(conversation));
  const before = conversation.version;
  let stale = false;
  try {
    await request("readwrite", (chats) => {
      const asked = chats.get(conversation.id);
      asked.onsuccess = () => {
        stale = (asked.result?.version ?? 0) !== conversation.version;
        if (stale) return chats.transaction.abort();
        conversation.version += 1;
        conversation.changed_ms = Date.now();
        chats.put(conversation);
      };
    });
  } catch (error) {
    if (stale) throw new Changed();
    conversation.version = before;
    if (error.name === "QuotaExceededError") throw new Full();
    throw error;
  }
  others?.postMessage({ kept: conversation.id });
}

export async function remove(...ids) {
  ids.forEach((id) => memory.delete(id));
  await request("readwrite", (chats) => ids.forEach((id) => chats.delete(id)));
  ids.forEach((id) => others?.postMessage({ removed: id }));
}

// Calls back with { kept } or { removed }, each an id, when another tab has done that.
export function watch(call) {
  if (others) others.onmessage = ({ data }) => call(data);
}

// Says to the other tabs that this one answers until `end` is fulfilled.
export const hold = (id, end) => navigator.locks?.request(lock(id), () => end);

// Whether the tab that ran a conversation's answer is closed.
export async function isLost(conversation) {
  if (!isAnswering(conversation)) return false;
  if (!navigator.locks) return Date.now() - conversation.changed_ms > CLOSED_MS;
  const { held, pending } = await navigator.locks.query();
  return ![...held, ...pending].some((one) => one.name === lock(conversation.id));
}

const lock = (id) => `azu-chat-${id}`;

function database() {
  opened ??= new Promise((resolve) => {
    const asked = globalThis.indexedDB?.open("azu", 1);
    if (!asked) return resolve(null);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  }).catch(() => null);  // a browser may forbid to open it
  return opened;
}

// Returns what `work` asks for once the transaction is complete; null without a database.
async function request(mode, work) {
  const found = await database();
  return found && new Promise((resolve, reject) => {
    const transaction = found.transaction(STORE, mode);
    const asked = work(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onabort = () => reject(transaction.error ?? new Error("the browser ended the transaction"));
  });
}
