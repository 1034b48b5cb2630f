// Receipts: what a job cost, which nodes ran it and what each worker earned, checked in this browser.

import { ask, read, words } from "./api.js";
import { count, find, held, hype, make, many, replace, say } from "./dom.js";
import * as store from "./store.js";
import { faultOf } from "./verify.js";

const MOST_TRIES = 20;
const PAUSE_MS = 500;

export function start() {
  find("find").addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = `#receipts/${find("job").value.trim()}`;
  });
}

export async function list() {
  const { data } = await read("/v1/jobs?limit=20");
  replace(find("jobs"), ...(data.length ? data.map(line) : [make("li", { textContent: "You have asked nothing yet." })]));
}

export async function show(jobId) {
  find("job").value = jobId;
  say(find("receipt-fault"), "");
  try {
    const text = await ended(jobId);
    replace(find("receipt"), ...receipt(JSON.parse(text), faultOf(text), await received(jobId)));
  } catch (error) {
    replace(find("receipt"));
    say(find("receipt-fault"), words(error));
  }
}

// The receipt of a job that was just stopped comes a moment later.
async function ended(jobId) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await (await ask(`/v1/receipts/${encodeURIComponent(jobId)}`)).text();
    } catch (error) {
      if (error.status !== 409 || tries >= MOST_TRIES) throw error;
      replace(find("receipt"), make("p", { className: "dim", textContent: "The job is ending." }));
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
}

// How many tokens of a job's answer this browser has; null if it did not read it.
async function received(jobId) {
  const turns = (await store.all()).flatMap((chat) => chat.turns);
  return turns.find((turn) => turn.job === jobId)?.tokens ?? null;
}

function line(job) {
  const cost = job.charged_lamports === null ? job.status : hype(job.charged_lamports);
  const at = new Date(job.created_at_ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return make("li", {},
    make("a", { href: `#receipts/${job.job_id}`, textContent: job.job_id }),
    make("span", { className: "dim", textContent: `${at} · ${job.model} · ${cost}` }));
}

function receipt(one, fault, received) {
  const prompt = one.charged_lamports ? one.prompt_tokens : 0;
  const got = received === null ? "" : ` This browser received ${many(received, "token")} of the ${count(one.completion_tokens)} that are charged.`;
  const sum = `(${count(prompt)} prompt + ${count(one.completion_tokens)} completion) tokens × ` +
    `${many(one.num_layers, "layer")} × ${many(one.lamports_per_token_layer, "lamport")}`;
  return [
    make("h2", { textContent: one.job_id }),
    make("p", { className: "sum" }, make("strong", { textContent: hype(one.charged_lamports) }), ` = ${many(one.charged_lamports, "lamport")}`),
    make("p", { className: "dim", textContent: `${one.model_id}: ${sum}` }),
    table("Where it went", ["Recipient", "Lamports"], [
      ...Object.entries(one.worker_lamports).map(([address, lamports]) => [address, count(lamports)]),
      ...(one.held_lamports ? [["Held: the node's owner is unknown", count(one.held_lamports)]] : []),
      ["The platform", count(one.platform_lamports)],
      ["Back to you", count(one.released_lamports)],
    ], "amounts"),
    table("Nodes that ran it", ["Node", "Layers and experts"], one.topology.map((piece) => [piece.node, held(piece).filter(Boolean).join("; ")])),
    make("p", { className: `id ${fault ? "bad" : "good"}`, textContent: fault ||
      `Checked in this browser: signed with the key that the platform ${one.signer} certified; its parts are what was charged.` + got }),
    make("p", { className: "dim id", textContent: `Transfer ${one.transfer_id}` }),
  ];
}

function table(caption, heads, rows, className = "") {
  return make("table", { className }, make("caption", { textContent: caption }),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col", textContent: head })))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", { textContent: cell }))))));
}
