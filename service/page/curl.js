// A request as a command for a POSIX shell.

import { toJson } from "./api.js";

/** The command that makes the image and writes it to `file`. A key is named by its variable, never written out. */
export function curl(url, body, file, withKey) {
  const lines = [
    `curl -X POST ${quoted(url)}`,
    `-H 'Content-Type: application/json'`,
    `-H 'Accept: image/png'`,
    ...(withKey ? [`-H "X-API-Key: $SDXL_API_KEY"`] : []),
    `--data-raw ${quoted(printable(toJson(body)))}`,
    `--fail-with-body --output ${quoted(file)}`,
  ];
  return lines.join(" \\\n  ");
}

/** In single quotes a shell reads everything as it stands, but for the single quote. */
export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** JSON without characters that a terminal obeys or hides: they become JSON's own escapes. */
const printable = (json) =>
  json.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (letter) =>
    letter.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join(""),
  );
