// The network: nodes with their VRAM, and the layers and experts of each model on them.

import { bar, count, find, held, make, many, replace, size, time } from "./dom.js";
import * as picture from "./picture.js";

let before = null;

export function show(found) {
  const now = performance.now();
  const speeds = new Map(found.deployments.map((model) => [model.model_id, speed(model, now)]));
  before = { at: now, models: new Map(found.deployments.map((model) => [model.model_id, model.activity])) };
  picture.show(found, new Map([...speeds].map(([id, one]) => [id, one.tokens])));
  const alive = found.nodes.filter((node) => node.state === "alive").length;
  const total = [...speeds.values()].reduce((sum, one) => sum + one.tokens, 0);
  replace(find("summary"),
    ...fact("Speed", `${total.toFixed(1)} tokens/s`),
    ...fact("Jobs", `${count(found.jobs.running)} running, ${count(found.jobs.waiting)} waiting`),
    ...fact("Nodes", `${alive} of ${found.nodes.length} alive`));
  replace(find("nodes"), ...(found.nodes.length ? [...found.nodes].sort((a, b) => a.name.localeCompare(b.name)).map(node) : [make("li", { textContent: "No node has joined yet." })]));
  replace(find("models"), ...(found.deployments.length
    ? found.deployments.map((one) => model(one, speeds.get(one.model_id)))
    : [make("p", { className: "dim", textContent: "No model is up; the first prompt brings one up." })]));
}

function fact(name, value) {
  return [make("dt", { textContent: name }), make("dd", { textContent: value })];
}

function node(one) {
  const lent = one.vram_total_bytes;
  const taken = lent - one.vram_free_bytes;
  const words = [
    `${size(taken)} of ${size(lent)} taken`,
    one.vram_used_bytes === null ? "" : `${size(one.vram_used_bytes)} held by azu's processes`,
    one.vram_other_bytes ? `${size(one.vram_other_bytes)} by others` : "",
  ].filter(Boolean).join(", ");
  return make("li", {},
    make("div", { className: "row" },
      make("strong", { textContent: one.name }),
      make("span", { className: `state ${one.state}`, textContent: one.state }),
      make("span", { className: "dim", textContent: `${one.device}, load ${Math.round(100 * one.load)}%` })),
    bar(`VRAM: ${words}`, [["used", taken / lent]]),
    make("p", { className: "dim", textContent: words }));
}

function model(one, rate) {
  const does = one.activity;
  const stages = one.topology.filter((piece) => piece.layers[1] > piece.layers[0]);
  const apart = one.topology.filter((piece) => piece.layers[1] === piece.layers[0]);
  const kv = `${count(does.kv_blocks_used)} of ${count(does.kv_blocks)} KV blocks in use`;
  return make("article", {},
    make("div", { className: "row" },
      make("h3", { textContent: one.model_id }),
      make("span", { className: `state ${one.state}`, textContent: one.state }),
      make("span", { className: "dim", textContent: many(one.num_layers, "layer") })),
    make("p", { className: "facts", textContent: [
      `${rate.tokens.toFixed(1)} tokens/s`,
      rate.first === null ? "" : `first token ${time(rate.first)}`,
      rate.each === null ? "" : `then ${time(rate.each)} each`,
      `${count(does.running_sequences)} running`,
      does.waiting_sequences ? `${count(does.waiting_sequences)} waiting` : "",
    ].filter(Boolean).join(" · ") }),
    make("ol", { className: "stages", label: "Stages" }, ...stages.map(stage)),
    apart.length ? make("ul", { className: "experts", label: "Experts apart from their layers" }, ...apart.map(experts)) : null,
    bar(kv, [["used", does.kv_blocks ? does.kv_blocks_used / does.kv_blocks : 0]]),
    make("p", { className: "dim", textContent: kv +
      (does.stalls ? ` · ${many(does.stalls, "stall")}` : "") +
      (does.recoveries ? ` · ${many(does.recoveries, "recovery", "recoveries")}` : "") }));
}

function stage(piece) {
  const [start, end] = piece.layers;
  const [layers, experts] = held(piece);
  const part = make("li", {}, make("strong", { textContent: piece.node }), make("span", { textContent: layers }),
    experts ? make("span", { className: "dim", textContent: experts }) : null);
  part.style.flexGrow = String(end - start);
  return part;
}

function experts(piece) {
  return make("li", {}, make("strong", { textContent: piece.node }), ` ${held(piece)[1]}`);
}

function speed(one, now) {
  const then = before?.models.get(one.model_id);
  if (!then) return { tokens: 0, first: null, each: null };
  const seconds = (now - before.at) / 1000;
  const tokens = Math.max(0, one.activity.generated_tokens - then.generated_tokens) / seconds;
  return { tokens, first: mean("time_to_first_token"), each: mean("time_per_token") };

  // The mean since the last refresh, or since the start if nothing was measured since.
  function mean(name) {
    const { count: all, seconds: spent } = one.activity[name];
    const since = all - then[name].count;
    if (since > 0) return (spent - then[name].seconds) / since;
    return all ? spent / all : null;
  }
}
