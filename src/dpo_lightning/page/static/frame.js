// What views share: elements, requests, messages. Text is only ever put in as text, never as HTML.

export { t } from "./words.js";

// An element: el("button", { class: "quiet", onclick: save }, "Save"). Strings among the children become text.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// The server does not answer at all: it was stopped, or the connection is gone.
export class Gone extends Error {}

async function post(action, values, signal) {
  let response;
  try {
    response = await fetch(`/api/${action}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(values),
      signal,
    });
  } catch (error) {
    throw signal?.aborted ? error : new Gone(error.message);
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.trim();
  try { message = JSON.parse(text).error ?? message; } catch { /* it is plain text */ }
  throw new Error(message || `HTTP ${response.status}`);
}

// Calls an action, "view/name", with an object and returns its answer, an object.
export async function call(action, values = {}) {
  const response = await post(action, values);
  try {
    return await response.json();
  } catch (error) {
    throw new Gone(error.message);
  }
}

// The answers of an action that returns many: for await (const piece of stream("chat/ask", { question })) ...
// An AbortController's signal ends it with an AbortError, and the server's work as well.
export async function* stream(action, values = {}, signal = undefined) {
  const reader = (await post(action, values, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const piece = JSON.parse(line);
        if (piece.error) throw new Error(piece.error);
        yield piece;
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

// A random name, also where the page does not come over HTTPS.
export function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Shows a message at the bottom: for a moment, or with kind "error" until the next one. notice("") removes it.
let fading;
export function notice(text, kind = "") {
  const box = document.getElementById("notice");
  box.textContent = text;
  box.className = text ? `visible ${kind}` : "";
  clearTimeout(fading);
  if (kind !== "error") fading = setTimeout(() => { box.className = ""; }, 4000);
}
