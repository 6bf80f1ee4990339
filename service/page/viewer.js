// The image that is shown large: its settings, and what can be done with it.

import { address, key } from "./api.js";
import { curl } from "./curl.js";
import { describe, element, make, put, toast } from "./dom.js";
import { follow, markField, unmarkFields } from "./form.js";
import * as images from "./images.js";
import { changed, requestOf, valuesOf } from "./settings.js";

export class Viewer {
  image = null;
  #promoted = null;
  #refinable = false;

  /** `actions`: `use(image)`, `refine(body, image)`, `deleted(id)`, `show(id)`. */
  constructor(actions) {
    this.actions = actions;
    follow(element("strength-range"), element("strength"));
    element("use").addEventListener("click", () => actions.use(this.image));
    element("copy").addEventListener("click", () => this.#copy());
    element("delete").addEventListener("click", () => this.#delete());
    element("refine-open").addEventListener("click", () => this.#refining(element("refine").hidden));
    element("refine-close").addEventListener("click", () => this.#refining(false));
    element("refine").addEventListener("submit", (event) => this.#refine(event));
    for (const link of element("shown").querySelectorAll("[data-format]")) {
      link.addEventListener("click", (event) => this.#download(event, link.dataset.format));
    }
  }

  promote({ config }) {
    this.#promoted = valuesOf(config);
    this.#refinable = Boolean(config.model.refiner);
    if (this.image) this.#tell(this.image);
  }

  async show(image) {
    if (this.image?.id !== image.id) element("refine-prompt").value = image.prompt;
    this.image = image;
    this.#refining(false);
    this.#tell(image);
    const shown = element("image");
    const { width, height } = image.values;
    Object.assign(shown, { alt: image.prompt, width, height });
    element("frame").style.setProperty("--ratio", width / height);
    const address = await images.addressOf(image.id);
    if (this.image !== image) return; // another one was chosen meanwhile
    shown.src = address;
    for (const link of element("shown").querySelectorAll("[data-format]")) {
      const { format } = link.dataset;
      link.download = images.fileName(image.id, format);
      link.href = key.get() ? "#" : await images.addressOf(image.id, format);
      if (this.image !== image) return;
    }
    this.reveal(true);
  }

  /** Whether the image is to be seen; without an image there is a placeholder. */
  reveal(wanted) {
    element("shown").hidden = !wanted || !this.image;
    element("empty").hidden = !wanted || Boolean(this.image);
    if (!wanted) this.#refining(false);
  }

  /** Show no image any more. */
  clear() {
    this.image = null;
    element("image").removeAttribute("src");
    this.reveal(true);
  }

  /** Mark a field of the refine form; false if it has no such field. */
  mark(name, message) {
    if (!this.image) return false;
    this.#refining(true);
    return markField(element("refine"), name, message);
  }

  #tell(image) {
    const { prompt, seed, source, timings, warnings = [], config, values } = image;
    put("caption", prompt);
    put("caption-negative", values.negative_prompt && `Without: ${values.negative_prompt}`);
    element("caption-negative").hidden = !values.negative_prompt;
    element("warnings").replaceChildren(...warnings.map((text) => make("li", {}, text)));
    element("warnings").hidden = !warnings.length;
    element("refine-open").hidden = !this.#refinable;
    const differing = source ? {} : changed(values, this.#promoted);
    const size = ({ width, height }) => `${width} × ${height}`;
    const told = (differs, text, promoted) =>
      differs ? make("span", { className: "differs" }, `${text} (promoted ${promoted})`) : text;
    const value = (name, say = String) => told(name in differing, say(values[name]), say(this.#promoted[name]));
    const onOff = (on) => (on ? "on" : "off");
    describe(element("facts"), [
      ["Seed", seed],
      ["Size", told("width" in differing || "height" in differing, size(values), size(this.#promoted))],
      ["Steps", value("steps")],
      ["Guidance scale", value("guidance_scale")],
      ["Scheduler", value("scheduler")],
      source ? ["Refined from", this.#source(image)] : ["Refiner", value("refiner", onOff)],
      ...(timings ? [["Drawn in", `${(timings.denoise_ms / 1000).toFixed(1)} s`]] : []),
      ["Configuration", make("code", {}, config)],
    ]);
  }

  #source({ source, strength }) {
    const button = make("button", { type: "button", className: "link" }, source.slice(0, 8));
    button.addEventListener("click", () => this.actions.show(source));
    return make("span", {}, [button, ` at strength ${strength}`]);
  }

  async #copy() {
    const { path, body } = requestOf(this.image, this.#promoted);
    const text = curl(address(path), body, images.fileName(this.image.id, "png"), Boolean(key.get()));
    toast((await copied(text)) ? "Copied the command" : "The browser did not allow copying");
  }

  async #download(event, format) {
    if (!key.get()) return;
    event.preventDefault();
    const link = make("a", { href: await images.addressOf(this.image.id, format) });
    link.download = images.fileName(this.image.id, format);
    link.click();
  }

  #delete() {
    const { id, prompt } = this.image;
    const dialog = element("confirm");
    put("confirm-text", `“${prompt}” cannot be brought back, other than by drawing it again.`);
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => dialog.returnValue === "delete" && this.actions.deleted(id), { once: true });
    dialog.showModal();
  }

  #refining(wanted) {
    element("refine").hidden = !wanted;
    element("refine-open").setAttribute("aria-expanded", wanted);
    if (!wanted) return;
    unmarkFields(element("refine"));
    element("refine-prompt").focus();
  }

  #refine(event) {
    event.preventDefault();
    unmarkFields(element("refine"));
    const body = { id: this.image.id, strength: Number(element("strength").value) };
    const prompt = element("refine-prompt").value;
    if (prompt !== this.image.prompt) body.prompt = prompt;
    this.actions.refine(body, this.image);
  }
}

/** Put text on the clipboard. Over plain HTTP browsers have no clipboard API, but the old command. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { value: text, className: "hidden" });
    document.body.append(area);
    const before = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}
