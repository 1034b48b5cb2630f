// What this account earns by lending: how much, with which models, when it is sent, and what its nodes do.

import { key, read } from "./api.js";
import { bar, find, held, hype, make, replace, size } from "./dom.js";

// Shows the account's earnings beside what its nodes of `network` hold.
export async function show(network) {
  if (!key.get() || document.body.dataset.view !== "lend") return;
  const found = await read("/v1/earnings");
  find("claim").hidden = found.claimed;
  const byModel = new Map();
  for (const one of found.by_hour) byModel.set(one.model_id, (byModel.get(one.model_id) ?? 0) + one.lamports);
  const lately = [...byModel.values()].reduce((sum, one) => sum + one, 0);
  replace(find("earned"), ...[
    ["Earned and not sent", hype(found.earned_lamports)],
    ["On its way", hype(found.paying_lamports)],
    ["Sent to you", hype(found.paid_lamports)],
    ["In the last 24 hours", `${hype(lately)}, ${hype(Math.round(lately / 24))} per hour`],
    ["Next payout", payout(found)],
  ].flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  replace(find("earned-by"), ...(byModel.size ? [make("table", { className: "amounts" },
    make("caption", { textContent: "Earned in the last day, by model" }),
    make("tbody", {}, ...[...byModel].map(([model, lamports]) => make("tr", {},
      make("th", { scope: "row", textContent: model }), make("td", { textContent: hype(lamports) })))))] : []));
  const mine = network.nodes.filter((node) => node.payout_address === found.address);
  replace(find("my-nodes"), ...(mine.length ? mine.map((node) => line(node, network.deployments))
    : [make("li", { textContent: "No node pays to this address." })]));
}

function payout(found) {
  if (found.paying_lamports) return `${hype(found.paying_lamports)} are on their way`;
  if (!found.claimed) return "none before this address claims its earnings: with a wallet below, by azu join, or with azu earnings --claim";
  const missing = found.payout_threshold_lamports - found.earned_lamports;
  return missing > 0 ? `at ${hype(found.payout_threshold_lamports)}: ${hype(missing)} are missing` : "as soon as what you earned has matured";
}

function line(node, deployments) {
  const taken = node.vram_total_bytes - node.vram_free_bytes;
  const words = `${size(taken)} of ${size(node.vram_total_bytes)} taken, load ${Math.round(100 * node.load)}%`;
  const pieces = deployments.flatMap((model) => model.topology.filter((piece) => piece.node_id === node.node_id)
    .map((piece) => `${model.model_id}: ${held(piece).filter(Boolean).join("; ")}`));
  return make("li", {},
    make("div", { className: "row" }, make("strong", { textContent: node.name }),
      make("span", { className: `state ${node.state}`, textContent: node.state })),
    bar(words, [["used", taken / node.vram_total_bytes]]),
    make("p", { className: "dim", textContent: words }),
    ...(pieces.length ? pieces : ["It holds nothing now."]).map((text) => make("p", { className: "dim", textContent: text })));
}
