// The form for a new image: what is asked, what of it differs from the promoted values, and which field is wrong.

import { changed, FIELDS, valuesOf } from "./settings.js";
import { element, make, put } from "./dom.js";

const NUMBERS = ["steps", "guidance_scale", "width", "height"];
const SLIDERS = ["steps", "guidance_scale"];

/** A field whose content cannot even be sent. */
export class Unsendable extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

export class Form {
  #promoted = null;
  #resets = new Map(FIELDS.map((name) => [name, make("button", { type: "button", className: "reset", hidden: true })]));

  constructor() {
    this.root = element("ask");
    for (const name of SLIDERS) follow(element(`${name}-range`), element(name));
    for (const [name, reset] of this.#resets) {
      this.root.querySelector(`[data-field="${name}"] .head`).append(reset);
      reset.addEventListener("click", () => this.#restore(name));
    }
    for (const name of NUMBERS) element(name).addEventListener("change", () => this.#refuseEmpty(name));
    for (const type of ["input", "change"]) this.root.addEventListener(type, (event) => this.#edited(event.target));
    element("swap").addEventListener("click", () => this.#swap());
  }

  /** Take over what is promoted: limits, hints and defaults. What the user has changed stays changed. */
  promote({ config, limits, schedulers }) {
    const kept = this.#promoted ? changed(this.values, this.#promoted) : {};
    this.#promoted = valuesOf(config);
    const ranges = { steps: limits.steps, guidance_scale: limits.guidance_scale, width: limits.side, height: limits.side };
    for (const [name, [low, high]] of Object.entries(ranges)) {
      for (const input of [element(name), SLIDERS.includes(name) && element(`${name}-range`)]) {
        if (input) Object.assign(input, { min: low, max: high });
      }
      if (SLIDERS.includes(name)) put(`${name}-hint`, `${low} to ${high}, promoted ${this.#promoted[name]}`);
    }
    const [low, high] = limits.side;
    put("size-hint", `Multiples of 8, ${low} to ${high}, promoted ${this.#promoted.width} × ${this.#promoted.height}`);
    element("scheduler").replaceChildren(...schedulers.map((name) => new Option(name, name)));
    put("scheduler-hint", `Promoted ${this.#promoted.scheduler}`);
    const refinable = Boolean(config.model.refiner);
    element("refiner").disabled = !refinable;
    put("refiner-hint", refinable ? `Promoted ${this.#promoted.refiner ? "on" : "off"}` : "This model has no refiner");
    element("negative_prompt").placeholder = this.#promoted.negative_prompt || "What should not be in it";
    this.#set({ ...this.#promoted, ...kept });
  }

  /** The settings as they stand; an emptied number means the promoted one. */
  get values() {
    const numbers = NUMBERS.map((name) => {
      const input = element(name);
      return [name, input.value === "" ? this.#promoted[name] : Number(input.value)];
    });
    return {
      ...Object.fromEntries(numbers),
      negative_prompt: element("negative_prompt").value,
      scheduler: element("scheduler").value,
      refiner: element("refiner").checked,
    };
  }

  /** The body of the request: the prompt, what is changed, and the seed if it is fixed. Raises `Unsendable`. */
  request() {
    this.unmark();
    for (const name of NUMBERS) {
      if (element(name).validity.badInput) throw new Unsendable(name, "This must be a number.");
    }
    const body = { prompt: element("prompt").value, ...changed(this.values, this.#promoted) };
    if (!body.prompt.trim()) throw new Unsendable("prompt", "Say what to draw, for example “A cat in a hat”.");
    if (element("seed-fixed").checked) {
      const seed = element("seed").value.trim();
      if (!/^\d+$/.test(seed)) throw new Unsendable("seed", "This must be a whole number, for example 7.");
      body.seed = seed.replace(/^0+(?=\d)/, "");
    }
    return body;
  }

  /** The settings of an image, its seed included. */
  fill({ prompt, values, seed }) {
    this.unmark();
    element("prompt").value = prompt;
    element("seed-fixed").checked = true;
    element("seed").value = seed;
    this.#set(values);
  }

  /** Mark the field that is wrong and go there; false if the form has no such field. */
  mark(name, message) {
    return markField(this.root, name, message);
  }

  unmark() {
    unmarkFields(this.root);
  }

  #set(values) {
    for (const name of FIELDS) {
      const input = element(name);
      if (name === "refiner") input.checked = values[name];
      else input.value = values[name];
    }
    for (const name of SLIDERS) element(`${name}-range`).value = values[name];
    this.#show();
  }

  #restore(name) {
    this.#set({ ...this.values, [name]: this.#promoted[name] });
    element(name).focus();
  }

  #refuseEmpty(name) {
    const input = element(name);
    if (input.value === "" && !input.validity.badInput) this.#restore(name);
  }

  #swap() {
    const { width, height } = this.values;
    this.#set({ ...this.values, width: height, height: width });
  }

  #edited(input) {
    const field = input.closest(".field");
    if (field) unmarkField(field);
    this.#show();
  }

  #show() {
    const fixed = element("seed-fixed").checked;
    element("seed").disabled = !fixed;
    if (!this.#promoted) return;
    const differing = changed(this.values, this.#promoted);
    for (const [name, reset] of this.#resets) {
      reset.hidden = !(name in differing);
      reset.closest(".field").classList.toggle("overridden", name in differing);
      const shown = { true: "on", false: "off", "": "none" }[this.#promoted[name]] ?? this.#promoted[name];
      const text = name === "negative_prompt" ? "Reset" : `Reset to ${shown}`;
      put(reset, text);
      reset.setAttribute("aria-label", `${text}: ${name.replace("_", " ")}`);
    }
    const count = Object.keys(differing).length;
    put("changes", count ? `${count} overridden` : "As promoted");
    element("changes").classList.toggle("some", count > 0);
  }
}

/** Keep a slider and its number together. The number rules, and may hold what the slider cannot show. */
export function follow(slider, number) {
  slider.addEventListener("input", () => {
    number.value = slider.value;
  });
  number.addEventListener("input", () => {
    slider.value = number.value;
  });
}

/** Show a message at a field of a form and focus it; false if the form has no such field. */
export function markField(form, name, message) {
  const field = form.querySelector(`[data-field="${CSS.escape(name)}"]`);
  if (!field) return false;
  unmarkField(field);
  const input = field.querySelector("textarea, select, input[type=number], input[type=text], input[role=switch]");
  const error = make("p", { className: "error", id: `${input.id}-error` }, message);
  field.append(error);
  field.closest("details")?.setAttribute("open", "");
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", `${error.id} ${input.getAttribute("aria-describedby") ?? ""}`.trim());
  input.focus();
  return true;
}

export const unmarkFields = (form) => form.querySelectorAll(".field").forEach(unmarkField);

function unmarkField(field) {
  const error = field.querySelector(".error");
  if (!error) return;
  error.remove();
  for (const input of field.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    const described = input.getAttribute("aria-describedby").split(" ").filter((id) => id !== error.id);
    if (described.length) input.setAttribute("aria-describedby", described.join(" "));
    else input.removeAttribute("aria-describedby");
  }
}
