// One image on its way: asked for, followed, cancelled, asked for again. Knows no page.

import { ask, Dropped, events, Problem } from "./api.js";

const PATIENCE_MS = 3000; // how long a cancel waits for the image's id before it just hangs up

export class Drawing {
  #hangUp = new AbortController();
  #id = null;

  /** `path` is "generate" or "refine". Whoever repeats a drawing gets the same image: its key stays. */
  constructor(path, body) {
    this.path = path;
    this.body = body;
    this.cancelled = false;
    this.key = `playground-${hexadecimal(16)}`;
  }

  /** `{event, data}` from queued to done. Raises `Problem` or `Dropped`; after a cancel, whatever comes first. */
  async *follow() {
    const options = { headers: { "Idempotency-Key": this.key }, signal: this.#hangUp.signal };
    for await (const told of events(`${this.path}?previews=true`, this.body, options)) {
      this.#id ??= told.data.id ?? null;
      if (this.cancelled && told.event === "queued") await this.#tell();
      if (told.event === "error") throw new Problem(told.data.status, told.data, told.data.retry_after ?? null);
      yield told;
      if (told.event === "done") return;
    }
    throw new Dropped();
  }

  /** A key keeps an image alive when its client hangs up, so cancelling takes a call of its own. */
  async cancel() {
    if (this.cancelled) return;
    this.cancelled = true;
    setTimeout(() => this.#hangUp.abort(), PATIENCE_MS);
    await this.#tell();
  }

  async #tell() {
    if (this.#id === null) return;
    try {
      await ask(`jobs/${this.#id}`, { method: "DELETE" });
    } catch (error) {
      const late = error instanceof Problem && [404, 409].includes(error.status); // it was done before
      if (!late) this.#hangUp.abort();
    }
  }
}

/** Random digits; `crypto.randomUUID` is missing where the page comes over plain HTTP. */
function hexadecimal(bytes) {
  const numbers = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(numbers, (number) => number.toString(16).padStart(2, "0")).join("");
}
