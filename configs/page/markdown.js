// Markdown as elements. HTML in it stays text, images become links: nothing that a model writes runs or loads.

import { copyButton, make } from "./dom.js";
import { lexer } from "./vendor/marked.js";

const LINK = /^(?:https?|mailto):/i;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

// Shows a text that grows. A block that is complete stays as it is, so that nothing in it flickers.
export class Markdown {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.complete = 0;  // characters
    this.blocks = 0;
  }

  show(text) {
    const plain = text.replace(/\r\n?/g, "\n");
    if (!plain.startsWith(this.text)) this.complete = this.blocks = 0;
    this.text = plain;
    let tokens;
    try {
      tokens = lexer(plain.slice(this.complete));
    } catch (error) {
      // Thousands of quotes in each other are more than the parser takes.
      return this.element.replaceChildren(make("p", { textContent: plain }));
    }
    this.#draw(tokens);
    const open = tokens.findLastIndex((token) => token.type !== "space");
    for (const token of tokens.slice(0, Math.max(open, 0))) {
      this.complete += token.raw.length;
      this.blocks += block(token) ? 1 : 0;
    }
  }

  #draw(tokens) {
    const old = [...this.element.children].slice(this.blocks);
    const fresh = tokens.map(block).filter(Boolean);
    fresh.forEach((element, index) => {
      if (!old[index]) this.element.append(element);
      else if (!grown(old[index], element)) old[index].replaceWith(element);
    });
    old.slice(fresh.length).forEach((element) => element.remove());
  }
}

// Adds to a block of code what is new, so that its button stays under the pointer.
function grown(old, fresh) {
  const [before, now] = [old, fresh].map((one) => one.querySelector?.(":scope > pre > code"));
  if (!before || !now || old.firstChild.textContent !== fresh.firstChild.textContent) return old.isEqualNode(fresh);
  if (!now.textContent.startsWith(before.textContent)) return false;
  before.append(now.textContent.slice(before.textContent.length));
  before.normalize();
  return true;
}

function block(token) {
  switch (token.type) {
    case "space": case "def": return null;
    case "hr": return make("hr");
    case "code": return code(token);
    // The page's own headings are h1 and h2, and no level may be left out.
    case "heading": return make(token.depth > 2 ? "h4" : "h3", {}, ...inline(token.tokens));
    case "blockquote": return make("blockquote", {}, ...token.tokens.map(block));
    case "list": return list(token);
    case "table": return table(token);
    case "paragraph": return make("p", {}, ...inline(token.tokens));
    case "text": return make("span", {}, ...inline(token.tokens ?? [token]));
    default: return make("p", { textContent: token.raw });
  }
}

function code(token) {
  const text = make("code", { textContent: token.text });
  return make("figure", { className: "code" },
    make("figcaption", {}, make("span", { textContent: token.lang ?? "" }), copyButton(() => text.textContent, "Copy code")),
    make("pre", { tabIndex: 0, role: "region", label: "Code" }, text));
}

function list(token) {
  const element = make(token.ordered ? "ol" : "ul", {}, ...token.items.map((item) => make("li", {},
    item.task ? (item.checked ? "☑ " : "☐ ") : null,
    ...item.tokens.filter((part) => part.type !== "checkbox").map(block))));
  if (token.ordered && token.start > 1) element.start = token.start;
  return element;
}

function table(token) {
  const cell = (name, align, one) => make(name, { className: align ?? "" }, ...inline(one.tokens));
  return make("div", { className: "scroll", role: "region", label: "Table", tabIndex: 0 }, make("table", {},
    make("thead", {}, make("tr", {}, ...token.header.map((one, index) => cell("th", token.align[index], one)))),
    make("tbody", {}, ...token.rows.map((row) => make("tr", {}, ...row.map((one, index) => cell("td", token.align[index], one)))))));
}

const inline = (tokens) => tokens.map(part);

function part(token) {
  switch (token.type) {
    case "strong": case "em": case "del": return make(token.type, {}, ...inline(token.tokens));
    case "codespan": return make("code", { textContent: token.text });
    case "br": return make("br");
    case "link": return link(token.href, inline(token.tokens));
    case "image": return link(token.href, [token.text || "image"]);
    case "escape": return token.text;
    case "text": return token.tokens ? make("span", {}, ...inline(token.tokens)) : decoded(token.text);
    default: return token.raw;
  }
}

function link(address, children) {
  if (!LINK.test(address)) return make("span", {}, ...children);
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer", title: address }, ...children);
}

const decoded = (text) => text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w+));/gi, (whole, decimal, hex, name) => {
  const point = decimal ? Number(decimal) : parseInt(hex, 16);
  if (name) return ENTITIES[name.toLowerCase()] ?? whole;
  return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : whole;
});
