// The view Label: two replies to choose from, or one to find good or bad.

import { call, el, Gone, notice, randomName, t } from "./frame.js";

const LONG = 6000; // characters of a text that are shown at first
const TAB = "dpo-lightning-tab";
const PENDING = "dpo-lightning-click"; // a click that the server has not confirmed; it survives a reload

// Storage of this tab, which may be switched off.
const memory = new Map();
function keep(name, value) {
  memory.set(name, value);
  try { sessionStorage.setItem(name, value); } catch { /* until a reload, then */ }
}
function kept(name) {
  try { return sessionStorage.getItem(name) ?? memory.get(name); } catch { return memory.get(name); }
}
function tabName() {
  if (!kept(TAB)) keep(TAB, randomName());
  return kept(TAB);
}

const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// A text, of which only the beginning is shown if it is very long.
export function long(text, attributes) {
  const box = el("div", attributes, text.slice(0, LONG));
  if (text.length <= LONG) return box;
  const more = el("button", { class: "quiet", type: "button", onclick: () => box.replaceChildren(text) },
    t("show all", { count: text.length.toLocaleString() }));
  box.append("… ", more);
  return box;
}

// A reply, with the words marked that the other one does not have.
export function said(reply, attributes) {
  if (!reply.parts) return long(reply.text, attributes);
  return el("div", attributes,
    reply.parts.map(([text, differs]) => (differs ? el("mark", { class: "differs" }, text) : text)));
}

export function button(key, words, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, "data-key": key, ...attributes }, el("kbd", {}, key), el("span", {}, words));
}

function marksOf(reply) {
  const marks = reply.marks.map(([word, yes]) =>
    el("span", { class: `mark ${yes ? "yes" : "no"}` }, `${yes ? "✓" : "✗"} ${t(word)}`));
  if (!reply.stopped) marks.push(el("span", { class: "mark no" }, t("cut off")));
  return el("div", { class: "marks" }, marks);
}

class Label {
  constructor(root) {
    this.root = root;
    this.state = null;
    this.busy = false; // a click is on its way
    this.editing = null; // "which" of two, or the number of the reply that is being edited
    this.left = false; // another tab is open
  }

  get task() { return this.state?.task; }

  async start() {
    const pending = kept(PENDING);
    if (pending) await this.send(...JSON.parse(pending));
    else await this.refresh();
  }

  // Asks for a task until there is one, or no prompt is left.
  async refresh() {
    while (!this.left) {
      const state = await this.answer("next", {});
      if (this.left) return;
      this.state = state;
      this.draw();
      if (state.task || !state.left || state.problem) return;
      await wait(400);
    }
  }

  // The answer of an action; while the server does not answer at all, it is asked again.
  async answer(action, values) {
    for (let attempt = 0; ; attempt++) {
      try {
        const found = await call(`label/${action}`, { tab: tabName(), ...values });
        if (attempt) notice(t("server back"));
        else if (document.querySelector("#notice.error")) notice("");
        return found;
      } catch (error) {
        if (!(error instanceof Gone) || this.left) throw error;
        notice(t(action === "next" ? "server gone" : "server gone, click kept"), "error");
        await wait(1000);
      }
    }
  }

  async send(action, values) {
    if (this.busy) return;
    this.busy = true;
    this.root.classList.add("busy");
    keep(PENDING, JSON.stringify([action, values]));
    try {
      const state = await this.answer(action, values);
      keep(PENDING, "");
      this.editing = null;
      this.state = state;
      if (state.refused) notice(t(`refused ${state.refused}`));
      else if (state.undone === false) notice(t("nothing to undo"));
    } catch (error) {
      if (!(error instanceof Gone)) keep(PENDING, "");
      notice(error.message, "error");
    } finally {
      this.busy = false;
      this.root.classList.remove("busy");
    }
    if (this.left) return;
    if (this.state && this.editing === null) this.draw();
    if (!this.task) await this.refresh();
  }

  choose(choice, more = {}) {
    if (!this.task) return;
    const side = { first: 0, good: 0, bad: 0, second: 1 }[choice];
    this.root.querySelectorAll(".reply")[side]?.classList.add("chosen");
    this.send("click", { click: randomName(), task: this.task.name, choice, ...more });
  }

  undo() { this.send("undo", { click: randomName() }); }

  // Begins to edit a reply; without a number, asks which of two.
  edit(number = null) {
    if (!this.task) return;
    this.editing = number ?? (this.state.pairs ? "which" : 0);
    this.draw();
    const field = this.root.querySelector("textarea");
    field?.focus();
    field?.setSelectionRange(field.value.length, field.value.length);
  }

  cancel() {
    if (this.editing === null) return;
    this.editing = null;
    this.draw();
  }

  save() {
    const text = this.root.querySelector("textarea").value;
    const number = this.editing;
    this.choose(this.state.pairs ? "edit" : "good", { edited: number, text });
  }

  // A key of a reply: chooses it, or says that it is the one to edit.
  side(number) {
    if (this.editing === "which") this.edit(number);
    else if (this.state?.pairs) this.choose(number ? "second" : "first");
    else this.choose(number ? "bad" : "good");
  }

  keys() {
    const pairs = () => this.state?.pairs;
    return {
      1: () => this.side(0),
      2: () => this.side(1),
      ArrowLeft: () => pairs() && this.side(0),
      ArrowRight: () => pairs() && this.side(1),
      "=": () => pairs() && this.choose("tie"),
      s: () => this.choose("skip"),
      e: () => this.edit(),
      u: () => this.undo(),
      Escape: () => this.cancel(),
    };
  }

  // ------------------------------------------------------------------ drawing

  draw() {
    const key = this.root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.root.replaceChildren(...(this.task ? this.drawTask() : this.drawPause()));
    if (key) this.root.querySelector(`[data-key="${key}"]`)?.focus(); // the same button, of the next prompt
  }

  drawStatus() {
    const { counts, left, same, labeller, output } = this.state;
    const done = Object.values(counts).reduce((sum, count) => sum + count, 0);
    const rows = done - (counts.tie ?? 0) - (counts.skip ?? 0);
    const more = [["ties", counts.tie], ["skips", counts.skip], ["same", same]].filter(([, count]) => count);
    return el("div", { class: "status dim small" },
      el("progress", { max: Math.max(1, done + left), value: done, "aria-label": t("progress") }),
      el("p", {}, [t("rows", { count: rows, output }), t("left", { count: left })].join(" · "),
        el("span", { class: "more" }, more.map(([word, count]) => ` · ${t(word, { count })}`))),
      el("p", { class: "more" }, t("by", { labeller })));
  }

  drawPause() {
    const { left, problem } = this.state;
    const words = problem ? [t("problem"), problem] : left ? [t("waiting"), ""] : [t("all done"), t("train now", this.state)];
    return [
      this.drawStatus(),
      el("div", { class: "card pause" }, el("h2", {}, words[0]), el("p", { class: "dim text" }, words[1])),
      el("div", { class: "bar" }, button("u", t("undo"), () => this.undo(), { class: "quiet" })),
    ];
  }

  drawTask() {
    const { question, context, replies } = this.task;
    const { pairs } = this.state;
    const which = this.editing === "which";
    return [
      this.drawStatus(),
      el("div", { class: "question" },
        long(question, { class: "text asked", role: "heading", "aria-level": 1 }),
        context ? long(context, { class: "text context", tabindex: 0 }) : null),
      el("div", { class: pairs ? "replies two" : "replies" }, replies.map((reply, number) => this.drawReply(reply, number))),
      el("p", { class: "hint small dim", role: "status" }, which ? t("edit which") : ""),
      el("div", { class: "bar" },
        pairs ? button("=", t("tie"), () => this.choose("tie")) : null,
        button("s", t("skip"), () => this.choose("skip")),
        button("e", t("edit"), () => this.edit()),
        button("u", t("undo"), () => this.undo())),
    ];
  }

  drawReply(reply, number) {
    const { pairs, code } = this.state;
    const style = `text${code ? " code" : ""}`;
    const label = pairs ? t("reply", { number: number + 1 }) : t("the reply");
    const editing = this.editing === number;
    const content = editing ? this.drawEditor(reply, style) : [
      said(reply, { class: `${style} said`, tabindex: 0, role: "region", "aria-label": label }),
      reply.text ? null : el("p", { class: "dim" }, t("empty")),
      marksOf(reply),
      pairs
        ? button(number + 1, t(this.editing === "which" ? "edit this" : "better"), () => this.side(number), { class: "choose" })
        : el("div", { class: "thumbs" },
            button(1, t("good"), () => this.choose("good"), { class: "choose" }),
            button(2, t("bad"), () => this.choose("bad"), { class: "choose" })),
    ];
    return el("article", { class: `card reply${editing ? " edited" : ""}`, "aria-label": label }, content);
  }

  drawEditor(reply, style) {
    const field = el("textarea", {
      class: style, rows: 6, "aria-label": t("edit"), spellcheck: "false",
      onkeydown: (event) => {
        if (event.isComposing) return;
        if (event.key === "Escape") this.cancel();
        else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.save();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    });
    field.value = reply.text;
    return [
      field,
      el("p", { class: "small dim" }, t(this.state.pairs ? "edit help" : "edit help thumbs")),
      el("div", { class: "thumbs" },
        button("Ctrl ↵", t("save"), () => this.save(), { class: "primary" }),
        button("Esc", t("cancel"), () => this.cancel())),
    ];
  }
}

export async function show(root) {
  const label = new Label(root);
  label.start().catch((error) => label.left || notice(error.message, "error"));
  return { keys: label.keys(), leave: () => { label.left = true; } };
}
