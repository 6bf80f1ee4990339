// The recent images, newest first, page by page.

import { element, make, put } from "./dom.js";
import * as images from "./images.js";

const PAGE = 24;

export class Gallery {
  #cursor = null;
  #tiles = new Map();
  #selected = null;

  /** `onPick(id)` is called for the image the user wants to see. */
  constructor(onPick) {
    this.onPick = onPick;
    element("refresh").addEventListener("click", () => this.load());
    element("more").addEventListener("click", () => this.#older());
    this.seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => this.#paint(e.target)), {
      rootMargin: "200px",
    });
  }

  /** The newest page, in place of what is there. */
  async load() {
    const page = await this.#page(null);
    if (!page) return;
    this.#tiles.clear();
    element("tiles").replaceChildren();
    this.#append(page);
  }

  /** Put a new image in front. */
  add(image) {
    if (!this.#tiles.has(image.id)) element("tiles").prepend(this.#tile(image));
    this.#note();
    this.select(image.id);
  }

  /** Take an image away and focus the one that takes its place. */
  remove(id) {
    const tile = this.#tiles.get(id);
    if (!tile) return;
    const next = tile.nextElementSibling ?? tile.previousElementSibling;
    tile.remove();
    this.#tiles.delete(id);
    this.#note();
    (next?.querySelector("button") ?? element("prompt")).focus();
  }

  select(id) {
    this.#tiles.get(this.#selected)?.querySelector("button").removeAttribute("aria-current");
    this.#selected = id;
    this.#tiles.get(id)?.querySelector("button").setAttribute("aria-current", "true");
  }

  async #older() {
    const first = this.#tiles.size;
    const page = await this.#page(this.#cursor);
    if (!page) return;
    this.#append(page);
    element("tiles").children[first]?.querySelector("button").focus();
  }

  async #page(cursor) {
    try {
      return await images.list(cursor, PAGE);
    } catch (error) {
      this.#note(`The images cannot be listed: ${error.message}`);
      return null;
    }
  }

  #append({ images, next }) {
    this.#cursor = next ?? null;
    element("more").hidden = !next;
    const drawn = images.filter(({ id, state }) => state === "done" && !this.#tiles.has(id));
    element("tiles").append(...drawn.map((image) => this.#tile(image)));
    this.#note();
    this.select(this.#selected);
  }

  #tile({ id, prompt, source }) {
    const image = make("img", { alt: prompt, decoding: "async" });
    const button = make("button", { type: "button", className: "tile", title: prompt }, image);
    if (source) button.append(make("span", { className: "badge" }, "refined"));
    button.dataset.id = id;
    button.addEventListener("click", () => this.onPick(id));
    const tile = make("li", {}, button);
    this.#tiles.set(id, tile);
    this.seen.observe(button);
    return tile;
  }

  async #paint(button) {
    this.seen.unobserve(button);
    const image = button.querySelector("img");
    image.addEventListener("error", () => button.classList.add("gone"), { once: true });
    try {
      image.src = await images.addressOf(button.dataset.id, "webp");
    } catch {
      button.classList.add("gone");
    }
  }

  #note(trouble) {
    const note = trouble ?? (this.#tiles.size ? "" : "No images yet. What is drawn here or through the API is listed here.");
    put("gallery-note", note);
    element("gallery-note").hidden = !note;
  }
}
