// Requests to the ingress with this tab's key; a Fault is an error as a sentence for the user.

const KEY = "azu-key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Fault extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

// What a user reads of any error.
export const words = (error) => (error instanceof Fault ? error.message : `This page made a mistake: ${error.message}`);

export async function ask(path, { body, signal, method = body ? "POST" : "GET" } = {}) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The network does not answer. Check that it is up and that you are online.");
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

export const read = async (path, options) => (await ask(path, options)).json();

// Yields the chunks of a streamed answer; a sign of life before or between them is { phase }, null if it says nothing.
export async function* chunks(path, { body, signal }) {
  const answer = await ask(path, { body, signal });
  const job = answer.headers.get("x-job-id");
  if (job) yield { job };
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Fault("The connection broke before the answer was complete. What was delivered is charged.");
    });
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { phase: line.startsWith(": phase ") ? JSON.parse(line.slice(8)) : null };
      if (!line.startsWith("data: ")) continue;
      const content = line.slice(6);
      if (content === "[DONE]") return;
      const chunk = JSON.parse(content);
      if (chunk.error) throw new Fault(sentence(chunk.error.message));
      yield chunk;
    }
  }
  throw new Fault("The connection ended before the answer was complete. What was delivered is charged.");
}

async function refused(answer) {
  const message = await answer.json().then((body) => body.error?.message ?? "", () => "");
  const status = answer.status;
  if (status === 401 && key.get()) return new Fault("This API key is not valid. Check it, or open another one.", status);
  if (status === 402) return new Fault(`${sentence(message)} Deposit some HYPE, or ask for fewer tokens.`, status);
  if (status === 429) return new Fault("That was too much at once. Wait a moment, then try again.", status);
  return new Fault(message ? sentence(message) : `The network refused this with status ${status}.`, status);
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
