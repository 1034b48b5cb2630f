// An answer as it streams into its turn. It goes on in the conversation that it began in, shown or not.

import { ask, chunks, words } from "./api.js";
import { messages } from "./conversation.js";
import { count, hype, many, time } from "./dom.js";

// A job that is stopped is ended by its id, which comes with the answer's headers: so long a stop waits for it.
const NAMELESS_MS = 4000;

const running = new Map();  // conversation's id -> the conversation, the answer's turn, and what stops it

export const isHere = (id) => running.has(id);
export const answering = (id) => running.get(id)?.conversation;

export function stop(id) {
  const one = running.get(id);
  if (!one || one.isStopping) return;
  one.isStopping = true;
  if (one.turn.job) return end(one);
  return new Promise((stopped) => setTimeout(() => stopped(end(one)), NAMELESS_MS));
}

async function end({ turn, controller }) {
  if (controller.signal.aborted) return;
  controller.abort();
  // Else the job would wait for this page to come back.
  if (turn.job) await ask(`/v1/jobs/${turn.job}/cancel`, { body: {} }).catch(() => {});
}

export const stopAll = () => Promise.all([...running.keys()].map(stop));

// Streams an answer to its end, and says in `turn` how it ended; calls `onChange` as it grows.
export async function run(conversation, turn, onChange) {
  const controller = new AbortController();
  const one = { conversation, turn, controller, isStopping: false };
  running.set(conversation.id, one);
  Object.assign(turn, { state: "running", fault: "" });
  const began = performance.now();
  try {
    for await (const chunk of events(conversation, turn, controller.signal)) {
      take(turn, chunk, performance.now() - began);
      if (one.isStopping && turn.job) end(one);
      onChange();
    }
    turn.state = "done";
  } catch (error) {
    const isStopped = error.name === "AbortError";
    turn.state = isStopped ? "stopped" : "cut";
    if (!isStopped) turn.fault = words(error);
  }
  delete turn.phase;
  running.delete(conversation.id);
  onChange();
}

function events(conversation, turn, signal) {
  if (turn.job) return chunks(`/v1/jobs/${turn.job}/stream?chat=true&after=${turn.tokens}`, { signal });
  const body = {
    model: turn.model, messages: messages(conversation), max_tokens: conversation.most, ...conversation.sampling,
    stream: true, stream_options: { include_usage: true },
  };
  return chunks("/v1/chat/completions", { body, signal });
}

function take(turn, chunk, spent_ms) {
  turn.job = chunk.job ?? turn.job;
  if (chunk.phase) turn.phase = chunk.phase.text;
  if (!chunk.choices) return;
  delete turn.phase;
  turn.job = chunk.azu?.job_id ?? turn.job;
  turn.tokens = Math.max(turn.tokens, chunk.azu?.after ?? 0);
  const { content, reasoning_content: reasoning } = chunk.choices[0]?.delta ?? {};
  if (reasoning) turn.reasoning = (turn.reasoning ?? "") + reasoning;
  if (content) turn.content += content;
  if (content || reasoning) {
    turn.first_ms ??= spent_ms;
    turn.spent_ms = spent_ms;
  }
  if (chunk.usage) turn.usage = chunk.usage;
}

// What is known of an answer in one line: what it waits for, its speed, its tokens, its cost.
export function facts(turn, price) {
  const so_far = `at least ${hype(turn.tokens * (price ?? 0))}`;
  const { usage } = turn;
  if (turn.state === "running") return turn.phase ?? (turn.first_ms === undefined ? `${turn.model} is reading` : `${speed(turn)} · ${so_far} so far`);
  const cost = usage ? [
    `${count(usage.prompt_tokens)} + ${many(usage.completion_tokens, "token")}`,
    ...(typeof usage.cost_lamports === "number" ? [hype(usage.cost_lamports)] : []),
  ].join(" · ") : `${so_far}; the receipt says how much`;
  if (turn.state === "stopped") return `Stopped · ${cost}`;
  if (turn.state === "cut") return `Cut off. ${turn.fault} ${cost}`;
  return [speed(turn), cost].join(" · ");
}

function speed(turn) {
  if (turn.first_ms === undefined) return turn.model;
  const seconds = (turn.spent_ms - turn.first_ms) / 1000;
  const rate = turn.tokens > 1 && seconds > 0 ? ` · ${((turn.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `first token after ${time(turn.first_ms / 1000)}${rate}`;
}
