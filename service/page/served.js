// What is served, and whether it can draw now: the head of the page.

import { ask, Dropped, Problem } from "./api.js";
import { describe, element, make, put } from "./dom.js";

const PAUSES_S = [2, 2, 3, 5, 10, 15]; // gently: a gateway counts every call as load

export class Served {
  #watching = false;

  /** `onConfig(answer of /config)` is called whenever it was read. */
  constructor(onConfig) {
    this.onConfig = onConfig;
    element("about-open").addEventListener("click", () => element("about").showModal());
    document.addEventListener("visibilitychange", () => !document.hidden && !this.ready && this.watch());
  }

  ready = false;

  /** Read the configuration, then ask until the service is ready. Raises `Problem` (401) where a key is wanted. */
  async start() {
    await this.#read();
    this.watch();
  }

  /** Ask whether the service is ready, again and again until it is. */
  async watch() {
    if (this.#watching) return;
    this.#watching = true;
    try {
      for (let tries = 0; !document.hidden; tries++) {
        if (await this.#check()) return;
        await new Promise((resolve) => setTimeout(resolve, 1000 * PAUSES_S[Math.min(tries, PAUSES_S.length - 1)]));
      }
    } finally {
      this.#watching = false;
    }
  }

  /** Something said otherwise: ask anew. */
  recheck() {
    this.ready = false;
    this.watch();
  }

  /** Tell why nothing could be read, and wait a little. */
  pause(error) {
    this.#show("away", "No connection", error.message);
    return new Promise((resolve) => setTimeout(resolve, 5000));
  }

  async #check() {
    const before = this.ready;
    try {
      await ask("readyz");
      this.ready = true;
      this.#show("ready", "Ready", "");
    } catch (error) {
      this.ready = false;
      if (error instanceof Dropped) this.#show("away", "No connection", "The service cannot be reached. Trying again.");
      else if (error instanceof Problem && error.status === 503) this.#show("waiting", "Not ready", error.message);
      else this.#show("away", "Unknown", error.message);
    }
    if (this.ready && !before) await this.#read().catch(() => {}); // the runtime and the attestation are known now
    return this.ready;
  }

  async #read() {
    const served = await ask("config");
    put("slot", served.slot);
    put("digest", short(served.digest));
    put("attested", served.attested ? "Attested" : "Not attested");
    element("attested").dataset.attested = served.attested;
    element("about-open").hidden = false;
    describe(element("about-facts"), facts(served));
    this.onConfig(served);
  }

  #show(state, text, trouble) {
    element("readiness").dataset.state = state;
    put("readiness", text);
    const sentence = trouble && trouble[0].toUpperCase() + trouble.slice(1);
    if (element("trouble").textContent !== sentence) put("trouble", sentence);
    element("trouble").hidden = !trouble;
  }
}

/** A digest's first 12 digits, for people. */
const short = (digest) => digest.slice(0, 12);

function facts({ slot, digest, attested, attested_reason: reason, config, runtime, evidence, evidence_note: note, version }) {
  const { base, revision, refiner } = config.model;
  return [
    ["Slot", slot],
    ["Digest", make("code", {}, short(digest))],
    ["Attested", attested ? "Yes: the golden images were drawn again and are the same" : `No: ${reason ?? "not yet"}`],
    ["Model", revision ? `${base} at ${revision.slice(0, 12)}` : base],
    ["Refiner", refiner ?? "none"],
    ["Runs on", runtime ? `${runtime.device}, ${runtime.dtype}` : "being loaded"],
    ["Evidence", evidence ? (evidence.why ?? "see /config") : (note ?? "none")],
    ["Version", version],
  ];
}
