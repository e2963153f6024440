// Chat: a question, and the replies of the reference and the policy as they grow, side by side.

import { call, el, notice, stream } from "./frame.js";
import { withWords } from "./words.js";

const t = withWords({
  question: ["Question", "问题"],
  "ask here": ["Ask a question …", "输入问题……"],
  "each alone": [
    "Enter asks, Shift+Enter makes a new line, Esc stops. Each question is asked on its own, without those before.",
    "回车发送，Shift+回车换行，Esc 停止。每个问题单独提问，不带前文。",
  ],
  schema: ["Schema or context", "表结构或上下文"],
  "schema here": ["CREATE TABLE singer (name VARCHAR, age INTEGER)", "CREATE TABLE singer (name VARCHAR, age INTEGER)"],
  ask: ["Ask", "提问"],
  stop: ["Stop", "停止"],
  stopped: ["stopped", "已停止"],
  "sampling": ["Sampling", "采样"],
  temperature: ["Temperature (0: the likeliest)", "温度（0 为最可能）"],
  "top p": ["Top p", "Top p"],
  "most tokens": ["Longest reply, in tokens", "回复最长（词元数）"],
  seed: ["Seed", "随机种子"],
  "as asked": ["The prompt as the models got it", "模型收到的完整提示"],
  "prompt cut": [
    "The first {cut} tokens of the prompt were cut off so that the reply has room. A shorter longest reply leaves more.",
    "为给回复留出空间，提示开头的 {cut} 个词元被截去。缩短回复上限可保留更多。",
  ],
  reference: ["Reference", "参考模型"],
  policy: ["Policy", "策略模型"],
});

const kept = { question: "", schema: "", sampling: null, turns: [] }; // also when another tab is opened

export async function show(root) {
  const about = await call("chat/about");
  kept.sampling ??= about.sampling;
  let asking = null;

  const turns = el("div", { class: "stack turns", "aria-live": "polite" }, kept.turns);
  const question = el("textarea", {
    rows: 2, id: "question", placeholder: t("ask here"), maxlength: about.longest, oninput: () => { kept.question = question.value; },
  });
  question.value = kept.question;
  const schema = el("textarea", {
    rows: 2, id: "schema", class: "code", placeholder: t("schema here"), spellcheck: "false", maxlength: about.longest,
    oninput: () => { kept.schema = schema.value; },
  });
  schema.value = kept.schema;
  const button = el("button", { type: "submit", class: "primary" });
  const form = el(
    "form", { class: "card stack composer", onsubmit: (event) => { event.preventDefault(); asking ? stop() : ask(); } },
    about.schema ? field("schema", t("schema"), schema) : null,
    field("question", t("question"), question),
    el("div", { class: "row" }, button, el("span", { class: "dim small keys" }, t("each alone"))),
    el("details", {}, el("summary", { class: "dim small" }, t("sampling")), samplingFields()),
  );
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!asking) ask();
    }
  });
  form.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  root.append(turns, form);
  drawButton();
  question.focus();

  function samplingFields() {
    const number = (name, label, attributes) => {
      const input = el("input", { type: "number", id: name, required: true, ...attributes });
      input.value = kept.sampling[name];
      input.addEventListener("input", () => { if (input.validity.valid) kept.sampling[name] = input.valueAsNumber; });
      return field(name, label, input);
    };
    return el(
      "div", { class: "fields" },
      number("temperature", t("temperature"), { min: 0, max: 10, step: "any" }),
      number("top_p", t("top p"), { min: 0.001, max: 1, step: "any" }),
      number("max_new_tokens", t("most tokens"), { min: 1, max: 100000, step: 1 }),
      number("seed", t("seed"), { min: 0, max: 4294967295, step: 1 }),
    );
  }

  function drawButton() {
    button.replaceChildren(t(asking ? "stop" : "ask"), el("kbd", {}, asking ? "Esc" : "⏎"));
  }

  function stop() {
    asking?.abort();
  }

  async function ask() {
    const text = question.value.trim();
    if (!text) return;
    const columns = new Map(about.names.map((name) => [name, el("div", { class: "text code going" })]));
    const prompt = el("div", { class: "text code tall" });
    const turn = el(
      "article", { class: "stack" },
      el("p", { class: "mine text" }, text),
      el("div", { class: about.names.length > 1 ? "replies two" : "replies" }, ...about.names.map((name) => el("div", { class: "card" }, el("h2", { class: "caption" }, t(name)), columns.get(name)))),
      el("details", {}, el("summary", { class: "dim small" }, t("as asked")), prompt),
    );
    kept.turns.push(turn);
    turns.append(turn);
    asking = new AbortController();
    question.value = kept.question = "";
    drawButton();
    try {
      for await (const piece of stream("chat/ask", { question: text, schema: schema.value, ...kept.sampling }, asking.signal)) {
        if (piece.prompt !== undefined) {
          prompt.textContent = piece.prompt;
          if (piece.cut) turn.append(el("p", { class: "small" }, t("prompt cut", piece)));
        } else {
          const column = columns.get(piece.name);
          column.append(column.textContent ? piece.text : piece.text.trimStart());
        }
        if (nearEnd()) form.scrollIntoView({ block: "end" });
      }
      for (const column of columns.values()) if (!column.textContent.trim()) column.replaceChildren(el("span", { class: "dim" }, t("empty")));
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message, "error");
      turn.append(el("p", { class: "dim small" }, error.name === "AbortError" ? t("stopped") : error.message));
    } finally {
      for (const column of columns.values()) column.classList.remove("going");
      asking = null;
      drawButton();
    }
  }

  function nearEnd() {
    return form.getBoundingClientRect().top < window.innerHeight + 200;
  }

  return { keys: { Escape: stop }, leave: stop };
}

function field(id, label, input) {
  return el("div", { class: "field" }, el("label", { for: id, class: "dim small" }, label), input);
}
