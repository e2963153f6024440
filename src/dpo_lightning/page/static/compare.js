// Compare: two models' replies to a prompt, without their names; a key says which is better, and how often each one is.

import { call, el, notice, stream } from "./frame.js";
import { button, long, said } from "./label.js";
import { withWords } from "./words.js";

const t = withWords({
  "compared of": ["{done} of {total} prompts compared", "已比较 {done} / {total} 个提示"],
  "all compared": ["All prompts are compared.", "所有提示都已比较完。"],
  "show result": ["Show the result", "显示结果"],
  "hide result": ["Hide the result", "隐藏结果"],
  "why hidden": [
    "Looking at it between two answers would tell which reply is whose.",
    "在两次判断之间查看结果，会暴露哪条回复出自哪个模型。",
  ],
  "your verdicts": ["Your verdicts", "你的判断"],
  "win rate": ["win rate of {a} against {b}", "{a} 对 {b} 的胜率"],
  counts: ["{wins} won · {losses} lost · {ties} tied", "{wins} 胜 · {losses} 负 · {ties} 平"],
  "of which same": ["{same} of the ties are the same reply twice", "其中 {same} 次平手是两边回复相同"],
  interval: ["95% interval {low} to {high}.", "95% 置信区间 {low} 至 {high}。"],
  "is better": ["More than chance: {name} is better.", "超出偶然：{name} 更好。"],
  undecided: ["Undecided: chance alone could explain it.", "尚无定论：可能只是偶然。"],
  method: [
    "Wilson's score interval; a tie is half a win for each. How to read it: docs/page.md.",
    "威尔逊区间；平手对双方各算半胜。说明见 docs/page.md。",
  ],
  "no verdict yet": ["No verdict yet.", "还没有判断。"],
  "the judge": ["The judge: {name}", "评判：{name}"],
  "let judge": ["Let the judge compare", "让评判来比较"],
  "judged of": ["{done} of {total} judged", "已评判 {done} / {total}"],
  "judge unknown": ["of {unknown} it cannot tell", "其中 {unknown} 个无法判断"],
  stop: ["Stop", "停止"],
  "kept in": ["Every verdict is a line of {file}.", "每个判断都是 {file} 中的一行。"],
});

let resultShown = false; // also after the language has changed
let judging = null; // an AbortController while the judge compares

class Compare {
  constructor(root) {
    this.root = root;
    this.item = null;
    this.state = null;
    this.waiting = true; // for the server
    this.left = false; // another tab is open
  }

  // Calls an action that returns the next item, and goes on over prompts with the same reply twice.
  async take(action) {
    this.item = null;
    this.waiting = true;
    this.draw();
    try {
      for (let more = true; more && !this.item && !this.left; action = "next") {
        const { item, state, more: others } = await call(`compare/${action}`);
        Object.assign(this, { item, state });
        more = others;
        this.draw();
      }
    } finally {
      this.waiting = false;
      this.draw();
    }
  }

  async answer(better) {
    const item = this.item;
    if (!item) return;
    this.item = null; // a second key is not for this prompt
    try {
      this.state = await call("compare/answer", { id: item.id, better });
    } catch (error) {
      this.item = item;
      throw error;
    }
    await this.take("next");
  }

  async undo() {
    if (!this.waiting) await this.take("undo");
  }

  toggle() {
    resultShown = !resultShown;
    this.draw();
  }

  async judge() {
    judging = new AbortController();
    try {
      for await (const state of stream("compare/judge", {}, judging.signal)) {
        this.state = state;
        this.draw();
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      judging = null;
      this.draw();
    }
  }

  // As a key's or a button's function.
  doing(action) {
    return () => Promise.resolve(action()).catch((error) => {
      notice(error.message, "error");
      this.draw();
    });
  }

  keys() {
    return {
      1: this.doing(() => this.answer("left")),
      2: this.doing(() => this.answer("right")),
      ArrowLeft: this.doing(() => this.answer("left")),
      ArrowRight: this.doing(() => this.answer("right")),
      "=": this.doing(() => this.answer("tie")),
      u: this.doing(() => this.undo()),
      r: this.doing(() => this.toggle()),
    };
  }

  // ------------------------------------------------------------------ drawing

  draw() {
    if (this.left || !this.state) return;
    this.root.replaceChildren(this.drawProgress(), ...(this.item ? this.drawItem() : [this.drawPause()]), this.drawResult());
  }

  drawProgress() {
    const { person, total, file } = this.state;
    const done = person.wins + person.losses + person.ties;
    const words = t("compared of", { done, total });
    return el("div", { class: "status dim small" },
      el("progress", { max: total, value: done, "aria-label": words }), el("p", {}, words), el("p", { class: "more" }, t("kept in", { file })));
  }

  drawPause() {
    return el("div", { class: "card pause" }, el("h2", {}, t(this.waiting ? "waiting" : "all compared")));
  }

  drawItem() {
    const { question, context, left, right } = this.item;
    const card = (reply, side, number) => el("article", { class: "card reply", "aria-label": t("reply", { number }) },
      said(reply, { class: "text code said", tabindex: 0 }),
      reply.text ? null : el("p", { class: "dim" }, t("empty")),
      button(number, t("better"), this.doing(() => this.answer(side)), { class: "choose" }));
    return [
      el("div", { class: "question" },
        long(question, { class: "text asked", role: "heading", "aria-level": 1 }),
        context ? long(context, { class: "text context", tabindex: 0 }) : null),
      el("div", { class: "replies two" }, card(left, "left", 1), card(right, "right", 2)),
      el("div", { class: "bar" },
        button("=", t("tie"), this.doing(() => this.answer("tie"))),
        button("u", t("undo"), this.doing(() => this.undo()))),
    ];
  }

  drawResult() {
    const { person, judge, names } = this.state;
    const done = !this.item && !this.waiting;
    const shown = resultShown || done;
    const words = t(shown ? "hide result" : "show result");
    return el("section", { class: "results" },
      done ? null : el("div", { class: "row" },
        button("r", words, this.doing(() => this.toggle()), { class: "quiet", "aria-expanded": String(shown) }),
        shown ? null : el("span", { class: "dim small" }, t("why hidden"))),
      shown ? rateCard(t("your verdicts"), person, names) : null,
      judge && (shown || judging) ? this.drawJudge() : null);
  }

  drawJudge() {
    const { judge, total, names } = this.state;
    const done = judge.wins + judge.losses + judge.ties + judge.unknown;
    const words = judging ? t("stop") : t("let judge");
    const act = this.doing(() => (judging ? judging.abort() : this.judge()));
    return rateCard(t("the judge", { name: t(judge.name) }), judge, names,
      judge.means.length ? meansTable(judge.means, names) : null,
      el("div", { class: "row" },
        judging || done < total ? el("button", { type: "button", onclick: act }, words) : null,
        el("span", { class: "dim small" },
          t("judged of", { done, total }) + (judge.unknown ? `, ${t("judge unknown", judge)}` : ""))));
  }
}

const percent = (share) => `${Math.round(100 * share)}%`;

// A win rate on a scale from 0 to 100%, with its interval and in words; more elements follow.
function rateCard(title, rate, names, ...more) {
  const heading = el("h2", { class: "caption" }, title);
  if (rate.rate === null) {
    return el("div", { class: "card stack" }, heading, el("p", { class: "dim" }, t("no verdict yet")), more);
  }
  const [a, b] = names;
  const band = el("span", { class: "band" });
  const dot = el("span", { class: "dot" });
  Object.assign(band.style, { left: `${100 * rate.low}%`, right: `${100 - 100 * rate.high}%` });
  dot.style.left = `${100 * rate.rate}%`;
  const verdict = rate.decided ? t("is better", { name: rate.rate > 0.5 ? a : b }) : t("undecided");
  return el("div", { class: "card stack" },
    heading,
    el("p", { class: "rate" },
      el("strong", { class: "big" }, percent(rate.rate)), el("span", { class: "dim name" }, t("win rate", { a, b }))),
    el("div", { class: "scale", "aria-hidden": "true" }, el("span", { class: "half" }), band, dot),
    el("p", {}, t("interval", { low: percent(rate.low), high: percent(rate.high) }), " ", verdict),
    el("p", { class: "dim small" }, t("counts", rate), rate.same ? ` · ${t("of which same", rate)}` : "", el("br"), t("method")),
    more);
}

function meansTable(means, names) {
  const head = el("tr", {}, el("td"), names.map((name) => el("th", { scope: "col", class: "name" }, name)));
  const rows = means.map(([label, ...texts]) =>
    el("tr", {}, el("th", { scope: "row" }, t(label)), texts.map((text) => el("td", {}, text))));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, rows));
}

export async function show(root) {
  const view = new Compare(root);
  view.state = await call("compare/state");
  view.doing(() => view.take("next"))();
  return { keys: view.keys(), leave: () => { view.left = true; judging?.abort(); } };
}
