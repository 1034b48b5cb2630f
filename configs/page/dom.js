// Elements and texts. No function parses HTML: an answer of the network is always text.

export const find = (id) => document.getElementById(id);

export function make(name, properties = {}, ...children) {
  const { data = {}, role, label, onclick, ...rest } = properties;
  const element = Object.assign(document.createElement(name), rest);
  Object.assign(element.dataset, data);
  if (role) element.setAttribute("role", role);
  if (label) element.setAttribute("aria-label", label);
  if (onclick) element.addEventListener("click", onclick);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

export const button = (textContent, onclick, rest = {}) => make("button", { type: "button", textContent, onclick, ...rest });

// A button that copies a text, and says whether it did.
export function copyButton(text, label) {
  const element = button("Copy", async () => {
    element.textContent = await copied(text()) ? "Copied" : "Not copied: select the text";
    setTimeout(() => { element.textContent = "Copy"; }, 2000);
  }, { className: "small", label });
  return element;
}

// The clipboard's own interface is there only over TLS and on this machine.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = make("textarea", { value: text, className: "unseen", readOnly: true });
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}

export function say(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// A bar of parts, each with its share of the whole, 0 to 1; `label` describes it.
export function bar(label, parts) {
  return make("div", { className: "bar", role: "img", label }, ...parts.map(([kind, share]) => {
    const part = make("i", { className: kind });
    part.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    return part;
  }));
}

// Replaces children only if they changed, so that nothing flickers and the focus stays.
export function replace(element, ...children) {
  const fresh = make("div", {}, ...children);
  if (fresh.innerHTML !== element.dataset.shown) {
    element.dataset.shown = fresh.innerHTML;
    element.replaceChildren(...fresh.childNodes);
  }
}

const number = new Intl.NumberFormat("en");
export const count = (value) => number.format(value);
export const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;

export function size(bytes) {
  const steps = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (bytes >= 1024 && step < steps.length - 1) { bytes /= 1024; step += 1; }
  return `${bytes.toFixed(bytes < 10 && step ? 1 : 0)} ${steps[step]}`;
}

export function time(seconds) {
  return seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
}

// Numbers in any order as ranges: "0–3, 6".
export function ranges(numbers) {
  const runs = [];
  for (const one of [...numbers].sort((a, b) => a - b)) {
    const last = runs.at(-1);
    if (last && last[1] === one - 1) last[1] = one;
    else runs.push([one, one]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ");
}

// The layers and the experts of a piece of a model, as two texts; either may be "".
export function held(piece) {
  const [start, end] = piece.layers;
  const layers = ranges(Array.from({ length: end - start }, (_, index) => start + index));
  const layersOf = new Map();
  for (const [layer, ids] of Object.entries(piece.experts)) {
    const same = ranges(ids);
    if (same) layersOf.set(same, [...(layersOf.get(same) ?? []), Number(layer)]);
  }
  const experts = [...layersOf].map(([same, of]) => `experts ${same} of ${named(ranges(of), of.length)}`);
  return [layers && named(layers, end - start), experts.join("; ")];
}

const named = (layers, number) => `layer${number === 1 ? "" : "s"} ${layers}`;

// One lamport is 10^-8 HYPE.
export function hype(lamports) {
  const text = (lamports / 1e8).toFixed(8).replace(/\.?0+$/, "");
  return `${text} HYPE`;
}
