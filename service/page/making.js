// The image in the making, as the page shows it: its place in the queue, its steps, its preview, what holds it up.

import { element, put, spoken } from "./dom.js";

const NEWS_EVERY_MS = 5000; // a screen reader that is told every step says nothing else

export class Making {
  #told = 0;
  #began = null;
  #answer = null;

  constructor(onCancel) {
    element("cancel").addEventListener("click", onCancel);
    element("again").addEventListener("click", () => this.#answer?.(true));
  }

  begin({ prompt, width, height }) {
    this.#began = null;
    const frame = element("preview-frame");
    frame.style.aspectRatio = `${width} / ${height}`;
    frame.style.setProperty("--ratio", width / height);
    element("preview").hidden = true;
    element("preview").removeAttribute("src");
    put("making-prompt", prompt);
    this.#show("Asking", "", null);
    element("making").hidden = false;
    element("cancel").disabled = false;
    this.#news("Drawing begins", true);
  }

  queued({ position, eta }) {
    const ahead = position > 1 ? `${position - 1} ahead of yours` : "Next in line";
    const time = eta == null ? "" : `, done in about ${spoken(eta)}`;
    this.#show(position ? "In the queue" : "Drawing", (position ? ahead : "Begun") + time, null);
    if (position) this.#news(`In the queue. ${ahead}${time}`);
  }

  step({ step, steps, preview }) {
    const now = performance.now();
    this.#began ??= { step, now };
    const pace = (now - this.#began.now) / (step - this.#began.step);
    const left = step > this.#began.step ? `about ${spoken((pace * (steps - step)) / 1000)} left` : "";
    const last = step >= steps;
    this.#show(last ? "Finishing" : `Step ${step} of ${steps}`, last ? "" : left, step / steps);
    if (preview) {
      element("preview").src = preview;
      element("preview").hidden = false;
    }
    this.#news(`Step ${step} of ${steps}`);
  }

  cancelling() {
    element("cancel").disabled = true;
    this.#answer?.(false);
    this.#show("Cancelling", "", null);
  }

  /** Count down to the next try. True when it is time or the user cannot wait; false after a cancel. */
  async holdUp(title, detail, seconds) {
    this.#began = null;
    this.#news(`${title}. ${detail} Trying again in ${seconds} s.`, true);
    const end = performance.now() + 1000 * seconds;
    const tick = () => {
      const left = Math.ceil((end - performance.now()) / 1000);
      this.#show(title, `${detail} Trying again in ${Math.max(left, 0)} s.`, 0);
      if (left <= 0) this.#answer?.(true);
    };
    const timer = setInterval(tick, 250);
    tick();
    return this.#asked().finally(() => clearInterval(timer));
  }

  /** Wait for the user to say whether to try again. */
  async ask(title, detail) {
    this.#began = null;
    this.#news(`${title}. ${detail}`, true);
    this.#show(title, detail, 0);
    return this.#asked();
  }

  end(news) {
    const focused = element("making").contains(document.activeElement);
    element("making").hidden = true;
    if (focused) element("generate").focus();
    this.#news(news, true);
  }

  #asked() {
    element("again").hidden = false;
    return new Promise((resolve) => {
      this.#answer = resolve;
    }).finally(() => {
      this.#answer = null;
      element("again").hidden = true;
    });
  }

  /** `done` is the share done, null while nobody knows. */
  #show(title, detail, done) {
    put("making-title", title);
    put("making-detail", detail);
    const progress = element("progress");
    if (done === null) progress.removeAttribute("value");
    else progress.value = done;
  }

  #news(text, now = false) {
    if (!now && performance.now() - this.#told < NEWS_EVERY_MS) return;
    this.#told = performance.now();
    put("progress-news", text);
  }
}
