// The list of conversations that this browser keeps.

import { answering, isHere, stop } from "./answer.js";
import { words } from "./api.js";
import * as chat from "./chat.js";
import * as talk from "./conversation.js";
import { find, make, replace, say } from "./dom.js";
import * as store from "./store.js";

// Tells the user why something could not be done.
const told = (work) => work.catch((error) => say(find("chat-fault"), words(error)));

export async function start() {
  find("clear").addEventListener("click", () => told(open(talk.begin())));
  find("delete-all").addEventListener("click", () => {
    if (confirm("Delete all chats of this browser?")) told(store.all().then((all) => removed(all.map((one) => one.id))));
  });
  find("chat-list").addEventListener("click", ({ target }) => {
    const { open: id, remove } = target.closest("button")?.dataset ?? {};
    if (id) told(openKept(id));
    if (remove) told(removed([remove]));
  });
  store.watch((change) => told(changedElsewhere(change)));
  const wide = matchMedia("(min-width: 1400px)");
  const unfold = () => { find("chats").open = wide.matches; };
  wide.addEventListener("change", unfold);
  unfold();
  const [latest] = await store.all();
  chat.show(latest ?? talk.begin());
  await list();
}

async function changedElsewhere({ kept, removed: gone }) {
  if (gone) stop(gone);
  if ([kept, gone].includes(chat.current().id)) await chat.reload();
  await list();
}

export async function list() {
  const all = await store.all();
  const current = chat.current();
  replace(find("chat-list"), ...all.map((one) => line(one, one.id === current.id)));
  find("delete-all").hidden = !all.length;
}

function line(one, isShown) {
  const name = talk.title(one);
  const choose = make("button", { type: "button", className: "name", textContent: name, data: { open: one.id } });
  if (isShown) choose.setAttribute("aria-current", "true");
  return make("li", {}, choose, isHere(one.id) ? make("span", { className: "dim", textContent: "answers" }) : null,
    make("button", { type: "button", className: "small", textContent: "×", label: `Delete ${name}`, data: { remove: one.id } }));
}

// A conversation whose answer runs here is newer in the memory than what is kept of it.
const openKept = async (id) => open(answering(id) ?? await store.get(id) ?? talk.begin());

function open(conversation) {
  chat.show(conversation);
  find("prompt").focus();
  return list();
}

async function removed(ids) {
  ids.forEach(stop);
  await store.remove(...ids);
  if (ids.includes(chat.current().id)) chat.show(talk.begin());
  await list();
}
