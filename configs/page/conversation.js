// A conversation. Its turns are what is shown, what is kept and what is sent: there is no other copy of them.
//
// A turn is { role, content }. An answer also has `model`, `state` ("running", "done", "stopped" or "cut"), and
// once they are known `job`, `reasoning`, `tokens` (so far), `usage`, `fault` and times. While it runs, `before`
// has the turns in whose place its question and it stand, and `asked` says whether the question came with it.

export function begin() {
  const random = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, version: 0, changed_ms: 0, model: "", system: "", most: 200, sampling: {}, draft: "", turns: [] };
}

export const title = (conversation) => conversation.turns[0]?.content.replace(/\s+/g, " ").slice(0, 60) || "New chat";

export const last = (conversation) => conversation.turns.at(-1);

export const isAnswering = (conversation) => last(conversation)?.state === "running";

// What the next answer is asked with.
export function messages(conversation) {
  const said = conversation.turns.filter((turn) => turn.content).map((turn) => ({
    role: turn.role, content: turn.content, ...(turn.reasoning ? { reasoning_content: turn.reasoning } : {}),
  }));
  return conversation.system ? [{ role: "system", content: conversation.system }, ...said] : said;
}

// Adds a question and its answer, which is empty so far, in the place of the turns `before`.
export function ask(conversation, content, before = []) {
  conversation.turns.push({ role: "user", content });
  return answer(conversation, before, true);
}

// Answers the last question again, in the place of the answer that it has.
export function again(conversation) {
  return answer(conversation, last(conversation).role === "assistant" ? [conversation.turns.pop()] : [], false);
}

// Asks an earlier question in other words; it and what came after it go.
export function edit(conversation, question, content) {
  return ask(conversation, content, conversation.turns.splice(conversation.turns.indexOf(question)));
}

// Ends an answer. One without a text was none: all is as before, and its question goes back into the draft.
export function settle(conversation, turn) {
  const { before = [], asked } = turn;
  const isEmpty = !turn.content && !turn.reasoning;
  if (isEmpty) {
    const [first] = conversation.turns.splice(conversation.turns.indexOf(turn) - (asked ? 1 : 0));
    conversation.turns.push(...before);
    if (asked) conversation.draft ||= first.content;
  }
  delete turn.before;
  delete turn.asked;
  return isEmpty;
}

function answer(conversation, before, asked) {
  const { model } = conversation;
  conversation.turns.push({ role: "assistant", content: "", model, state: "running", tokens: 0, before, asked });
  return last(conversation);
}
