// The chat: one answer at a time, as it streams, with its cost.

import { ask, chunks, Fault } from "./api.js";
import { count, find, hype, make, many, say, time } from "./dom.js";

let turns = [];
let running = null;
let prices = new Map();

export function start(onEnd) {
  const prompt = find("prompt");
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) send(onEnd);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      find("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  find("stop").addEventListener("click", () => running?.abort());
  find("clear").addEventListener("click", () => {
    running?.abort();
    turns = [];
    find("messages").replaceChildren();
    say(find("chat-fault"), "");
    prompt.focus();
  });
  find("model").addEventListener("change", showPrice);
}

// Offers the models; an earlier choice stays.
export function offer(models) {
  const choice = find("model");
  const before = choice.value;
  prices = new Map(models.map((model) => [model.id, model.lamports_per_token]));
  choice.replaceChildren(...models.map((model) =>
    make("option", { value: model.id, textContent: model.deployed ? model.id : `${model.id} (not up yet)` })));
  if (prices.has(before)) choice.value = before;
  choice.disabled = !models.length;
  find("hint").hidden = models.length > 0;
  showPrice();
}

function showPrice() {
  const price = prices.get(find("model").value);
  find("price").textContent = price ? `${many(price, "lamport")} per token` : "";
}

async function send(onEnd) {
  const text = find("prompt").value.trim();
  const model = find("model").value;
  if (!text) return;
  if (!model) return say(find("chat-fault"), "Type your API key first; it opens the models.");
  const asked = { role: "user", content: text };
  const answer = new Answer(model);
  const question = message("you", text);
  find("messages").append(question, answer.element);
  find("prompt").value = "";
  say(find("chat-fault"), "");
  working(new AbortController());
  answer.element.scrollIntoView({ block: "end" });
  try {
    await answer.stream([...turns, asked], Number(find("most").value), running.signal);
    turns.push(asked, { role: "assistant", content: answer.text });
  } catch (error) {
    if (error.name === "AbortError") {
      answer.stopped();
      // Else the job would wait for this page to come back.
      if (answer.job) ask(`/v1/jobs/${answer.job}/cancel`, { body: {} }).catch(() => {});
      turns.push(asked, { role: "assistant", content: answer.text });
    } else {
      answer.failed();
      if (!answer.text) {
        question.remove();
        find("prompt").value ||= text;
      }
      say(find("chat-fault"), error instanceof Fault ? error.message : `This page made a mistake: ${error.message}`);
    }
  } finally {
    working(null);
    onEnd();
  }
}

function working(controller) {
  running = controller;
  find("stop").hidden = !controller;
  find("send").disabled = Boolean(controller);
}

function message(who, text = "") {
  return make("li", { className: who }, make("p", { className: "text", textContent: text }));
}

class Answer {
  constructor(model) {
    this.model = model;
    this.text = "";
    this.tokens = 0;
    this.began = performance.now();
    this.first = null;
    this.job = null;
    this.element = message("model");
    this.element.classList.add("busy");
    this.facts = make("p", { className: "facts dim", textContent: `${model} is reading` });
    this.element.append(this.facts);
  }

  async stream(messages, most, signal) {
    const body = {
      model: this.model, messages, max_tokens: most, stream: true, stream_options: { include_usage: true },
    };
    for await (const chunk of chunks("/v1/chat/completions", body, signal)) this.take(chunk);
  }

  take(chunk) {
    this.job = chunk.azu?.job_id ?? this.job;
    this.tokens = Math.max(this.tokens, chunk.azu?.after ?? 0);
    const piece = chunk.choices[0]?.delta?.content;
    if (piece) this.add(piece);
    if (chunk.usage) this.ended(chunk.usage);
  }

  add(piece) {
    this.first ??= performance.now();
    const atEnd = isAtEnd();
    this.text += piece;
    this.element.firstChild.append(piece);
    this.facts.textContent = `${this.speed()} · at least ${this.least()} so far`;
    if (atEnd) this.element.scrollIntoView({ block: "end" });
  }

  ended(usage) {
    this.tokens = usage.completion_tokens;
    const tokens = `${count(usage.prompt_tokens)} + ${many(usage.completion_tokens, "token")}`;
    const cost = usage.cost_lamports === undefined ? "" :
      ` · ${many(usage.cost_lamports, "lamport")} (${hype(usage.cost_lamports)})`;
    this.close(`${this.speed()} · ${tokens}${cost}`);
  }

  stopped() { this.close(`Stopped · at least ${this.least()}; the receipt says how much`); }

  failed() {
    if (!this.text) this.element.remove();
    else this.close(`Cut off · at least ${this.least()}; the receipt says how much`);
  }

  close(words) {
    this.element.classList.remove("busy");
    this.facts.textContent = words;
    if (this.job) this.facts.append(" · ", make("a", { href: `#receipts/${this.job}`, textContent: "Receipt" }));
  }

  least() { return many(this.tokens * (prices.get(this.model) ?? 0), "lamport"); }

  speed() {
    if (this.first === null) return this.model;
    const seconds = (performance.now() - this.first) / 1000;
    const rate = this.tokens > 1 && seconds > 0 ? ` · ${((this.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    return `first token after ${time((this.first - this.began) / 1000)}${rate}`;
  }
}

function isAtEnd() {
  const list = find("messages");
  return list.scrollHeight - list.scrollTop - list.clientHeight < 80;
}
