// The page's few ways to its elements. Text goes in as text, never as markup.

/** The element with this id; a missing one is a mistake in the page. */
export function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/** Set an element's text; `target` is the element or its id. */
export function put(target, text) {
  (typeof target === "string" ? element(target) : target).textContent = text;
}

/** A new element. `content` is its text, or its children. */
export function make(tag, properties = {}, content = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...[content].flat());
  return made;
}

/** Fill a description list with pairs `[term, description]`; a description is text or an element. */
export function describe(list, pairs) {
  list.replaceChildren(...pairs.map(([term, description]) => make("div", {}, [make("dt", {}, term), make("dd", {}, description)])));
}

let timer;

/** A short note at the edge of the page, also read out. */
export function toast(text) {
  put("toast", text);
  element("toast").classList.add("on");
  clearTimeout(timer);
  timer = setTimeout(() => {
    element("toast").classList.remove("on");
    put("toast", "");
  }, 4000);
}

/** Seconds as one would say them. */
export function spoken(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}
