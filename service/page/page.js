// The playground: the parts and what passes between them.

import { Dropped, key, Problem } from "./api.js";
import { Drawing } from "./drawing.js";
import { element, put, toast } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Making } from "./making.js";
import * as images from "./images.js";
import { Served } from "./served.js";
import { Viewer } from "./viewer.js";

const TRIES = 6;

const form = new Form();
const making = new Making(cancel);
const gallery = new Gallery(pick);
const viewer = new Viewer({ use, refine, deleted, show: pick });
const served = new Served((answer) => {
  form.promote(answer);
  viewer.promote(answer);
});
let drawing = null;
let keyed = null; // called once a key was given

// --- draw ------------------------------------------------------------------------------------------------------------

function generate() {
  if (drawing) return;
  let body;
  try {
    body = form.request();
  } catch (error) {
    form.mark(error.field, error.message);
    return;
  }
  run(new Drawing("generate", body), { prompt: body.prompt, ...form.values }, form);
}

function refine(body, image) {
  if (drawing) return;
  const { width, height } = image.values;
  run(new Drawing("refine", body), { prompt: body.prompt ?? image.prompt, width, height }, viewer);
}

/** See a drawing through, from its request to its image. `origin` is the form whose fields an error may name. */
async function run(started, subject, origin) {
  drawing = started;
  element("generate").setAttribute("aria-disabled", "true");
  element("problem").hidden = true;
  viewer.reveal(false);
  making.begin(subject);
  inSight(element("stage"));
  let news = "Cancelled";
  let failed = null;
  try {
    const done = await persist(started);
    if (done) {
      const image = await images.read(done.id);
      gallery.add(image);
      await viewer.show(image);
      news = `The image is ready: ${image.prompt}`;
    }
  } catch (error) {
    news = "";
    failed = error;
  }
  drawing = null;
  element("generate").removeAttribute("aria-disabled");
  viewer.reveal(true);
  making.end(news);
  if (failed) tell(failed, origin);
  else if (news === "Cancelled") toast(news);
}

/** The answer of a drawing, tried again where that can help; null if it was cancelled. */
async function persist(started) {
  for (let tries = 1; ; tries++) {
    try {
      for await (const { event, data } of started.follow()) {
        if (event === "done") return data;
        if (!started.cancelled) making[event]?.(data);
      }
    } catch (error) {
      if (started.cancelled) return null;
      if (!(await worthwhile(error, tries))) {
        if (started.cancelled) return null;
        throw error;
      }
    }
  }
}

/** Whether to ask again after an error: once it is time, once there is a key, or once the user says so. */
async function worthwhile(error, tries) {
  if (error instanceof Dropped) {
    served.recheck();
    return making.ask("The connection was lost", "The image may still be drawn; trying again asks for the same one.");
  }
  if (!(error instanceof Problem)) return false;
  if (error.status === 401) {
    await askForKey();
    return true;
  }
  if (error.status === 503) served.recheck();
  if (error.retryAfter === null || tries >= TRIES) return false;
  return making.holdUp(error.title, `${sentence(error.message)}.`, error.retryAfter);
}

function cancel() {
  if (!drawing || drawing.cancelled) return;
  drawing.cancel();
  making.cancelling();
  keyed?.();
}

/** Say what went wrong, at the field that is wrong if there is one. */
function tell(error, origin) {
  if (!(error instanceof Problem || error instanceof Dropped)) console.error(error);
  const text = sentence(error.message);
  if (error.field && origin?.mark(error.field, text)) return;
  put("problem-title", error.title ?? "Something went wrong");
  put("problem-detail", error.requestId ? `${text}. Request ${error.requestId}` : text);
  element("problem").hidden = false;
}

/** Scroll to something whose head is out of sight, and leave the page alone otherwise. */
function inSight(part) {
  const { top } = part.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) part.scrollIntoView({ block: "start" });
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// --- look ------------------------------------------------------------------------------------------------------------

/** Show a stored image. */
async function pick(id) {
  if (drawing) {
    toast("An image is being drawn. Cancel it, or wait, to look at another.");
    return;
  }
  element("problem").hidden = true;
  try {
    await viewer.show(await images.read(id));
    gallery.select(id);
    inSight(element("stage"));
  } catch (error) {
    tell(error);
  }
}

function use(image) {
  form.fill(image);
  element("settings").open = true;
  element("prompt").focus();
  toast("The form has this image's settings");
}

async function deleted(id) {
  try {
    await images.remove(id);
  } catch (error) {
    if (error.status !== 404) return tell(error);
  }
  viewer.clear();
  gallery.remove(id);
  await images.release(id);
  toast("Deleted");
}

// --- key -------------------------------------------------------------------------------------------------------------

/** Show the field for the key and wait until one is given. */
function askForKey() {
  const wrong = Boolean(key.get());
  key.forget();
  put("key-title", wrong ? "The service does not know this API key" : "This service asks for an API key");
  element("key-form").hidden = false;
  element("key-forget").hidden = true;
  element("key").focus();
  return new Promise((resolve) => {
    keyed = resolve;
  });
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = element("key").value.trim();
  if (!given) return;
  key.set(given);
  element("key").value = "";
  element("key-form").hidden = true;
  element("key-forget").hidden = false;
  keyed?.();
});

element("key-forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});

// --- the page --------------------------------------------------------------------------------------------------------

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});

element("problem-close").addEventListener("click", () => {
  element("problem").hidden = true;
  element("prompt").focus();
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    const target = element("refine").contains(document.activeElement) ? element("refine") : element("ask");
    target.requestSubmit();
  } else if (event.key === "Escape") {
    cancel();
  }
});

async function open() {
  if (matchMedia("(max-width: 820px)").matches) element("settings").open = false;
  element("key-forget").hidden = !key.get();
  for (;;) {
    try {
      await served.start();
      await gallery.load();
      return;
    } catch (error) {
      if (error instanceof Problem && error.status === 401) await askForKey();
      else await served.pause(error);
    }
  }
}

open();
