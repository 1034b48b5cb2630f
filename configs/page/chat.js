// The shown conversation: its turns, what can be done with them, and the form that asks.

import { read, words } from "./api.js";
import { facts, isHere, run, stop } from "./answer.js";
import * as talk from "./conversation.js";
import { button, copyButton, find, hype, make, many, say } from "./dom.js";
import { Markdown } from "./markdown.js";
import * as store from "./store.js";

const SAMPLING = ["temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const QUOTE_AFTER_MS = 600;

let shown = talk.begin();
let prices = new Map();
let drawn = null;  // the last answer's turn, and what shows it
let quoting = 0;
let onAnswer = () => {};

export const current = () => shown;

// Calls `answered` when an answer begins here (false) and when it is over (true).
export function start(answered) {
  onAnswer = answered;
  const prompt = find("prompt");
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    // Safari ends a composition before its Enter comes, which then has this code.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    find("ask").requestSubmit();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(shown.id); });
  find("stop").addEventListener("click", () => stop(shown.id));
  prompt.addEventListener("input", () => {
    shown.draft = prompt.value;
    quoteSoon();
  });
  find("settings").addEventListener("input", settings);
  find("model").addEventListener("change", settings);
}

// Offers the models; the conversation's own stays chosen.
export function offer(models) {
  prices = new Map(models.map((model) => [model.id, model.lamports_per_token]));
  find("model").replaceChildren(...models.map((model) =>
    make("option", { value: model.id, textContent: model.deployed ? model.id : `${model.id} (not up yet)` })));
  find("model").disabled = !models.length;
  chooseModel();
}

function chooseModel() {
  const choice = find("model");
  if (prices.has(shown.model)) choice.value = shown.model;
  shown.model = choice.value;
  quoteSoon();
}

// Shows a conversation; an answer of another one goes on unseen.
export function show(conversation) {
  shown = conversation;
  find("prompt").value = shown.draft;
  find("system").value = shown.system;
  find("most").value = shown.most;
  for (const name of SAMPLING) find(name).value = shown.sampling[name] ?? "";
  say(find("chat-fault"), "");
  chooseModel();
  draw();
  toTheEnd();
}

function settings() {
  shown.model = find("model").value;
  shown.system = find("system").value.trim();
  shown.most = Number(find("most").value) || 1;
  shown.sampling = {};
  for (const name of SAMPLING) if (find(name).value !== "") shown.sampling[name] = Number(find(name).value);
  drawSystem();
  quoteSoon();
}

function send() {
  const text = find("prompt").value.trim();
  if (!text || talk.isAnswering(shown)) return;
  if (!shown.model) return say(find("chat-fault"), "The network offers no model now.");
  find("more").open ||= !find("settings").checkValidity();
  if (!find("ask").reportValidity()) return;
  shown.draft = "";
  answer(talk.ask(shown, text), () => { find("prompt").value = ""; });
}

// Keeps the conversation with its new answer first: what another tab has changed meanwhile is not overwritten.
async function answer(turn, onKept = () => {}) {
  const conversation = shown;
  say(find("chat-fault"), "");
  if (!await keep(conversation)) return;
  onKept();
  await finish(conversation, turn);
}

async function finish(conversation, turn) {
  let kept_ms = Date.now();
  const ended = run(conversation, turn, () => {
    refresh(conversation, turn);
    if (Date.now() - kept_ms < store.BEAT_MS) return;
    kept_ms = Date.now();
    keep(conversation);
  });
  store.hold(conversation.id, ended);
  if (conversation === shown) {
    draw();
    toTheEnd();
  }
  onAnswer(false);
  await ended;
  const isShown = conversation === shown;
  if (talk.settle(conversation, turn) && isShown) {
    find("prompt").value ||= conversation.draft;
    say(find("chat-fault"), turn.fault ?? "");
  }
  await keep(conversation);
  if (isShown) draw();
  onAnswer(true);
}

function toTheEnd() {
  const list = find("messages");
  list.scrollTop = list.scrollHeight;
}

// Returns whether the conversation is kept, or at least nothing newer is.
async function keep(conversation) {
  try {
    await store.keep(conversation);
    say(find("keep-fault"), await store.isLasting() ? "" : "This browser keeps no chats: they go when you close the page.");
    return true;
  } catch (error) {
    if (error instanceof store.Changed) {
      stop(conversation.id);
      if (conversation === shown) await reload("This chat was changed in another tab. It is shown as it is now; send again.");
      return false;
    }
    say(find("keep-fault"), error instanceof store.Full
      ? "This browser has no room for more chats: what you ask now is not kept. Delete old chats to make room." : words(error));
    return true;
  }
}

// Shows the conversation as another tab has kept it.
export async function reload(notice = "") {
  if (isHere(shown.id)) return;
  const draft = find("prompt").value;
  const kept = await store.get(shown.id);
  show({ ...(kept ?? talk.begin()), draft });
  if (notice) say(find("chat-fault"), notice);
}

// Called now and then: an answer whose tab was closed is cut.
export async function look() {
  const conversation = shown;
  const turn = talk.last(conversation);
  // An answer that is not drawn yet is about to begin here.
  if (drawn?.turn !== turn || isHere(conversation.id) || !await store.isLost(conversation)) return;
  Object.assign(turn, { state: "cut", fault: "The page was closed meanwhile." });
  talk.settle(conversation, turn);
  if (await keep(conversation) && conversation === shown) show(conversation);
}

function draw() {
  drawn = null;
  find("messages").replaceChildren(...shown.turns.map((turn) => (turn.role === "user" ? question(turn) : reply(turn))));
  drawSystem();
  working();
}

function drawSystem() {
  say(find("sent-system"), shown.system && `System prompt: ${shown.system}`);
}

function working() {
  const isBusy = talk.isAnswering(shown);
  find("chat").dataset.turns = shown.turns.length;
  quoteSoon();
  find("stop").hidden = !isHere(shown.id);
  find("send").disabled = isBusy;
  find("log").setAttribute("aria-busy", isBusy);
  document.querySelectorAll("#messages .actions button[data-changes]").forEach((one) => { one.disabled = isBusy; });
}

function question(turn) {
  const item = make("li", { className: "you" }, make("p", { className: "text", textContent: turn.content }),
    make("div", { className: "actions" }, changing("Edit", () => edit(turn, item), "Edit this question; what follows goes")));
  return item;
}

const changing = (words, call, title) => button(words, call, { className: "small", title, data: { changes: "" } });

function edit(turn, item) {
  const field = make("textarea", { value: turn.content, label: "Question", rows: 3 });
  const form = make("form", { className: "edit" }, field,
    make("div", { className: "buttons" }, button("Leave it", draw), make("button", { className: "main", textContent: "Send" })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (text && !talk.isAnswering(shown)) answer(talk.edit(shown, turn, text));
  });
  item.replaceChildren(form);
  field.focus();
}

function reply(turn) {
  const text = make("div", { className: "text" });
  const thoughts = make("details", { hidden: true }, make("summary", { textContent: "Reasoning" }), make("p"));
  const line = make("p", { className: "facts dim" });
  const actions = make("div", { className: "actions" });
  const item = make("li", { className: "model" }, thoughts, text, line, actions);
  drawn = { turn, item, text: new Markdown(text), thoughts, line, actions };
  update(drawn);
  return item;
}

function update({ turn, item, text, thoughts, line, actions }) {
  const isRunning = turn.state === "running";
  item.classList.toggle("busy", isRunning);
  text.show(turn.content);
  thoughts.hidden = !turn.reasoning;
  thoughts.lastChild.textContent = turn.reasoning ?? "";
  line.textContent = facts(turn, prices.get(turn.model));
  if (isRunning) return;
  if (turn.job) line.append(" · ", make("a", { href: `#receipts/${turn.job}`, textContent: "Receipt" }));
  actions.replaceChildren(copyButton(() => turn.content, "Copy answer"));
  if (turn !== talk.last(shown)) return;
  if (turn.state === "cut" && turn.job) {
    actions.append(changing("Continue", () => finish(shown, turn), "Take this answer up again; nothing is paid twice"));
  }
  actions.append(changing("Ask again", () => answer(talk.again(shown)), "Another answer in the place of this one"));
}

let waiting = false;

// Draws at most once a frame, and follows the text only where its end was in view.
function refresh(conversation, turn) {
  if (conversation !== shown || waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (drawn?.turn !== turn) return;
    const list = find("messages");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    update(drawn);
    if (atEnd) list.scrollTop = list.scrollHeight;
  });
}

function quoteSoon() {
  clearTimeout(quoting);
  quoting = setTimeout(quote, QUOTE_AFTER_MS);
}

// What the typed question would cost with all that is sent with it.
async function quote() {
  const price = prices.get(shown.model);
  const draft = find("prompt").value.trim();
  const line = find("price");
  line.textContent = price ? `${hype(price)} per token` : "";
  if (!price || !draft || talk.isAnswering(shown)) return;
  const asked = [...talk.messages(shown), { role: "user", content: draft }];
  try {
    const found = await read("/v1/quote", { body: { model: shown.model, messages: asked, max_tokens: shown.most } });
    if (find("prompt").value.trim() !== draft) return;
    line.textContent = `At most ${hype(found.max_lamports)} for ${many(found.prompt_tokens, "token")} and an answer of ` +
      `${found.max_tokens}; ${hype(found.expected_lamports)} if it has ${found.expected_tokens}`;
  } catch (error) {
    // That the network is not reached is said at the top.
    if (error.status) line.textContent = words(error);
  }
}
