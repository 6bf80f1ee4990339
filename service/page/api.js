// The way to the service and back. Knows HTTP, and nothing of the page.
//
// Every address is relative to the page's own, so that it stays under whatever prefix the page came from.

const KEY_NAME = "sdxl-lab-key";
const SILENCE_MS = 45_000; // the service sends a comment every 15 s

/** What the service refused (RFC 9457); `retryAfter` in seconds, null where a later try is no use. */
export class Problem extends Error {
  constructor(status, body = {}, retryAfter = null) {
    super(body.detail || body.title || `The service answered with status ${status}.`);
    this.status = status;
    this.title = body.title || "Something went wrong";
    this.field = body.field ?? null;
    this.requestId = body.request_id ?? null;
    this.retryAfter = retryAfter;
  }
}

/** The connection broke before the answer was whole: nobody knows what became of the request. */
export class Dropped extends Error {
  constructor() {
    super("The connection to the service was lost.");
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY_NAME) ?? "",
  set: (value) => sessionStorage.setItem(KEY_NAME, value),
  forget: () => sessionStorage.removeItem(KEY_NAME),
};

/** Seeds reach 2^63 - 1 and JavaScript's numbers do not: in a request and in an answer they are text here. */
export const toJson = (content, indent) =>
  JSON.stringify(content, null, indent).replace(/("seed": ?)"(\d+)"/g, "$1$2");
export const fromJson = (text) => JSON.parse(text.replace(/("seed"\s*:\s*)(\d+)/g, '$1"$2"'));

export const address = (path) => new URL(path, document.baseURI).href;

/** A response that is no error. Raises `Problem`, `Dropped`, or the signal's reason. */
export async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent["X-API-Key"] = key.get();
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method,
      signal,
      headers: sent,
      body: body === undefined ? undefined : toJson(body),
      cache: method === "GET" && !path.startsWith("download/") ? "no-store" : "default",
    });
  } catch (error) {
    signal?.throwIfAborted();
    throw error instanceof TypeError ? new Dropped() : error;
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

/** The answer's JSON, or null where there is none. */
export async function ask(path, options) {
  const text = await (await call(path, options)).text();
  return text ? fromJson(text) : null;
}

async function problemOf(response) {
  let body = {};
  try {
    body = fromJson(await response.text());
  } catch {
    // a gateway's page, perhaps: its status says enough
  }
  return new Problem(response.status, body, seconds(response.headers.get("Retry-After")));
}

const seconds = (header) => (/^\d+$/.test(header ?? "") ? Number(header) : null);

/** Post, and yield what the service tells while it works, each `{event, data}`. */
export async function* events(path, body, { headers, signal }) {
  const accept = { Accept: "text/event-stream", ...headers };
  const response = await call(path, { method: "POST", body, headers: accept, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parse = parser();
  try {
    for (;;) {
      const { value, done } = await unlessSilent(reader.read());
      if (done) return;
      yield* parse(value);
    }
  } catch (error) {
    signal?.throwIfAborted();
    throw error instanceof TypeError ? new Dropped() : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function unlessSilent(read) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Dropped()), SILENCE_MS);
  });
  try {
    return await Promise.race([read, silence]);
  } finally {
    clearTimeout(timer);
  }
}

/** Text in pieces to events, by the rules of the HTML standard, section 9.2.6; ids and retry times are not used. */
export function parser() {
  let rest = "";
  let event = "message";
  let data = [];
  return function* (piece) {
    const lines = (rest + piece).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield { event, data: fromJson(data.join("\n")) };
        event = "message";
        data = [];
        continue;
      }
      const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (name === "event") event = value;
      if (name === "data") data.push(value);
    }
  };
}
