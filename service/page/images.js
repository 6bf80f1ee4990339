// Stored images: what is known of them, and their bytes.

import { address, ask, call, key } from "./api.js";

const blobs = new Map();

/** An image as the page uses it; `values` are its settings, `strength` stands beside the `source` of a refined one. */
export async function read(id) {
  const { settings, width, height, negative_prompt, record, ...rest } = await ask(`images/${id}`);
  const values = { ...settings, width, height, negative_prompt: negative_prompt ?? "" };
  return { ...rest, values, strength: record?.strength };
}

/** A page of images, newest first: `{images, next}`. */
export const list = (cursor, limit) =>
  ask(`images?limit=${limit}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);

export const remove = (id) => ask(`images/${id}`, { method: "DELETE" });

const pathOf = (id, format) => `download/${id}${format === "png" ? "" : `?format=${format}`}`;

/** An address for `<img>` and `<a>`. With a key the bytes are fetched: neither element can send one. */
export async function addressOf(id, format = "png") {
  const path = pathOf(id, format);
  if (!key.get()) return address(path);
  if (!blobs.has(path)) blobs.set(path, call(path).then((response) => response.blob()).then(URL.createObjectURL));
  try {
    return await blobs.get(path);
  } catch (error) {
    blobs.delete(path);
    throw error;
  }
}

/** Let go of a deleted image's bytes. */
export async function release(id) {
  for (const [path, blob] of blobs) {
    if (!path.startsWith(`download/${id}`)) continue;
    blobs.delete(path);
    URL.revokeObjectURL(await blob);
  }
}

export const fileName = (id, format) => `sdxl-lab-${id.slice(0, 8)}.${format === "jpeg" ? "jpg" : format}`;
