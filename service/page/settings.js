// What a client may set, read from a configuration, and the request that asks for it. Knows no page and no HTTP.

/** The fields of `POST /generate` that go over the promoted configuration. */
export const FIELDS = ["negative_prompt", "steps", "guidance_scale", "scheduler", "width", "height", "refiner"];

/** A configuration's values of these fields. */
export function valuesOf(config) {
  const values = Object.fromEntries(FIELDS.map((name) => [name, config[name]]));
  return { ...values, negative_prompt: config.negative_prompt ?? "", refiner: Boolean(config.refiner) };
}

/** Those of `values` that differ from the promoted ones. */
export const changed = (values, promoted) =>
  Object.fromEntries(FIELDS.filter((name) => values[name] !== promoted[name]).map((name) => [name, values[name]]));

/** The request that makes an image again under the configuration promoted now: `{path, body}`. */
export function requestOf({ prompt, seed, values, source, strength }, promoted) {
  if (!source) return { path: "generate", body: { prompt, ...changed(values, promoted), seed } };
  const { negative_prompt, steps } = values;
  const body = { id: source, prompt, negative_prompt, strength, ...(steps === promoted.steps ? {} : { steps }), seed };
  return { path: "refine", body };
}
