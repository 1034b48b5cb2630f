// The network as a picture: its nodes, the time between them, each model's way through them, and tokens on it.

import { find, held, many, replace, time } from "./dom.js";

const SPACE = "http://www.w3.org/2000/svg";
const CARD = { least: 136, most: 210, line: 16, head: 44, gap: 30 };
const LETTER = 6.4;  // about as wide, in the cards' font
const COLOURS = 4;
const MOST_LINES = 4;
const MOST_DOTS = 5;

let last = null;

export function start() {
  new ResizeObserver(draw).observe(find("picture"));
}

// `speeds` has the tokens in a second of each model, by its id.
export function show(found, speeds) {
  last = { found, speeds };
  draw();
}

export const forget = () => { last = null; };

function draw() {
  const width = find("picture").clientWidth;
  if (!last || !width) return;
  const { found, speeds } = last;
  const ways = found.deployments.map((model, index) => way(model, index % COLOURS));
  const { places, height } = layout(found.nodes, ways, width);
  if (!places.size) return replace(find("picture"));
  const between = new Map();  // "a b" -> a link that is drawn once
  for (const one of ways) {
    one.stops.slice(1).forEach((stop, index) => add(between, places, one.stops[index], stop, `way c${one.colour}`));
    for (const [router, apart] of one.calls) add(between, places, router, apart, `call c${one.colour}`);
  }
  for (const name of places.keys()) for (const other of places.keys()) if (latency(places, name, other)) add(between, places, name, other, "link");
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": told(found, ways) },
    ...[...between.values()].map((one) => svg("path", { class: one.kind, d: one.path })),
    ...[...places.values()].map(card),
    ...[...between.values()].filter((one) => one.seconds).map(label),
    ...ways.flatMap((one) => dots(one, places, speeds.get(one.model.model_id) ?? 0)));
  replace(find("picture"), picture);
}

// A model's stages as node names in their order, and the nodes that hold experts for them.
function way(model, colour) {
  const stages = model.topology.filter((piece) => piece.layers[1] > piece.layers[0]);
  const apart = model.topology.filter((piece) => piece.layers[1] === piece.layers[0]);
  const stops = stages.map((piece) => piece.node).filter((name, index, all) => name !== all[index - 1]);
  const calls = apart.flatMap((set) => stages
    .filter(({ layers: [from, to] }) => Object.keys(set.experts).some((layer) => layer >= from && layer < to))
    .map((stage) => [stage.node, set.node]).filter(([a, b]) => a !== b));
  return { model, colour, stops, calls };
}

// Rows that run there and back, so that a model's next stage lies beside the one before.
function layout(nodes, ways, width) {
  const heldBy = new Map(nodes.map((node) => [node.name, []]));
  for (const { model, colour } of ways) {
    for (const piece of model.topology) heldBy.get(piece.node)?.push({ colour, text: held(piece).filter(Boolean).join(", ") });
  }
  const order = [...new Set([...ways.flatMap((one) => [...one.stops, ...one.calls.map(([, set]) => set)]), ...nodes.map((node) => node.name).sort()])]
    .filter((name) => heldBy.has(name));
  const columns = Math.max(1, Math.min(order.length, Math.floor((width + CARD.gap) / (CARD.least + CARD.gap))));
  const wide = Math.min(CARD.most, Math.max(CARD.least, Math.floor((width - 8 - (columns - 1) * 1.5 * CARD.gap) / columns)));
  const lines = Math.min(MOST_LINES, Math.max(0, ...[...heldBy.values()].map((one) => one.length)));
  const height = CARD.head + lines * CARD.line + 8;
  const step = columns > 1 ? (width - wide - 8) / (columns - 1) : 0;
  const below = height + 2 * CARD.gap + 8;
  const places = new Map(order.map((name, index) => {
    const row = Math.floor(index / columns);
    const column = row % 2 ? columns - 1 - (index % columns) : index % columns;
    const x = 4 + (columns > 1 ? column * step : (width - wide - 8) / 2);
    // Neighbours stand a little higher and lower: a link over a card between them stays in sight.
    const top = 34 + row * below;
    const y = top + (column % 2 ? 20 : 0);
    return [name, { node: nodes.find((one) => one.name === name), x, y, top, row, column, wide, height, held: heldBy.get(name) }];
  }));
  const rows = Math.ceil(order.length / columns);
  return { places, height: 34 + (rows - 1) * below + height + 24 };
}

function add(between, places, a, b, kind) {
  const [from, to] = [places.get(a), places.get(b)];
  const name = [a, b].sort().join(" ");
  if (!from || !to || a === b || between.has(name)) return;
  between.set(name, { kind, seconds: latency(places, a, b), ...curve(from, to) });
}

const middle = ({ x, y, wide, height }) => [x + wide / 2, y + height / 2];

// A straight line; a bow where a card would lie in its way.
function curve(from, to) {
  const [[x1, y1], [x2, y2]] = [middle(from), middle(to)];
  const isFar = from.row === to.row && Math.abs(from.column - to.column) > 1;
  const [x, y] = [(x1 + x2) / 2, isFar ? from.top - 12 : (y1 + y2) / 2];
  const path = isFar ? `M${x1} ${y1} Q${x} ${2 * y - (y1 + y2) / 2} ${x2} ${y2}` : `M${x1} ${y1} L${x2} ${y2}`;
  return { path, at: [x, y - 5] };
}

function latency(places, a, b) {
  const [one, other] = [places.get(a)?.node, places.get(b)?.node];
  return a === b ? 0 : Math.max(one?.links_s?.[other?.node_id] ?? 0, other?.links_s?.[one?.node_id] ?? 0);
}

const label = (one) => text(time(one.seconds), { x: one.at[0], y: one.at[1], class: "latency", "text-anchor": "middle" });

function card({ node, x, y, wide, height, held: pieces }) {
  const taken = (node.vram_total_bytes - node.vram_free_bytes) / node.vram_total_bytes;
  const inner = wide - 20;
  const letters = Math.floor((wide - 33) / LETTER);
  const shown = pieces.slice(0, pieces.length > MOST_LINES ? MOST_LINES - 1 : MOST_LINES);
  const rest = pieces.length - shown.length;
  return svg("g", { class: `node ${node.state}`, transform: `translate(${Math.round(x)} ${Math.round(y)})` },
    svg("rect", { width: wide, height, rx: 8, class: "card" }),
    svg("circle", { cx: 15, cy: 17, r: 4, class: "light" }),
    text(short(node.name, letters - 2), { x: 25, y: 21, class: "name" }, node.name),
    svg("rect", { x: 10, y: 30, width: inner, height: 5, rx: 2.5, class: "room" }),
    svg("rect", { x: 10, y: 30, width: Math.round(inner * Math.min(1, Math.max(0, taken))), height: 5, rx: 2.5, class: "taken" }),
    ...shown.flatMap((piece, index) => [
      svg("circle", { cx: 14, cy: CARD.head + 9 + index * CARD.line, r: 3.5, class: `piece c${piece.colour}` }),
      text(short(piece.text, letters), { x: 23, y: CARD.head + 13 + index * CARD.line, class: "held" }, piece.text),
    ]),
    ...(rest ? [text(`and ${many(rest, "more piece")}`, { x: 23, y: CARD.head + 13 + shown.length * CARD.line, class: "held" })] : []));
}

// A dot for each sequence that runs goes along the model's way, the faster the more tokens come in a second.
function dots({ model, colour, stops }, places, rate) {
  const running = Math.min(MOST_DOTS, model.activity.running_sequences || (rate > 0 ? 1 : 0));
  const legs = stops.slice(1).map((stop, index) => curve(places.get(stops[index]) ?? places.get(stop), places.get(stop)).path);
  if (!running || !places.has(stops[0])) return [];
  const [x, y] = middle(places.get(stops[0]));
  const path = legs.length ? legs.join(" ").replace(/ M[\d.-]+ [\d.-]+/g, "") : `M${x - 40} ${y} L${x + 40} ${y}`;
  const lap_s = Math.max(1, Math.min(4, Math.round(20 / Math.max(rate, 1)) / 2 + 1));
  return Array.from({ length: running }, (_, index) => svg("circle", { r: 5, class: `token c${colour}` },
    svg("animateMotion", { path, dur: `${lap_s}s`, begin: `${-(lap_s * index) / running}s`, repeatCount: "indefinite" })));
}

function told(found, ways) {
  const each = ways.map((one) => `${one.model.model_id} runs through ${one.stops.join(", then ")}`);
  return [many(found.nodes.length, "node"), ...each].join("; ");
}

const short = (words, most) => (words.length > most ? `${words.slice(0, most - 1)}…` : words);

function text(words, attributes, whole = "") {
  const element = svg("text", attributes);
  element.textContent = words;
  if (whole && whole !== words) {
    const title = svg("title", {});
    title.textContent = whole;
    element.append(title);
  }
  return element;
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SPACE, name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.append(...children);
  return element;
}
