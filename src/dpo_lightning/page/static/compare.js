// Compare: two models' replies to a prompt, without their names; a key says which is better, and how often each one is.

import { call, el, notice, stream, t } from "./frame.js";
import { addWords } from "./words.js";

addWords({
  "compared of": ["{done} of {total} prompts compared", "已比较 {done} / {total} 个提示"],
  prompt: ["Prompt", "提示"],
  "left better": ["Left is better", "左边更好"],
  "right better": ["Right is better", "右边更好"],
  tie: ["Tie", "平手"],
  "take back": ["Undo", "撤销"],
  "making replies": ["The two models are replying …", "两个模型正在生成回复……"],
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
  interval: ["95% interval {low} to {high}", "95% 置信区间 {low} 至 {high}"],
  "is better": ["More than chance: {name} is better.", "超出偶然：{name} 更好。"],
  undecided: ["Undecided: chance alone could explain it.", "尚无定论：可能只是偶然。"],
  method: [
    "Wilson's score interval; a tie is half a win for each. How to read it: docs/page.md.",
    "威尔逊区间；平手对双方各算半胜。说明见 docs/page.md。",
  ],
  "no verdict yet": ["No verdict yet.", "还没有判断。"],
  "the judge": ["The judge: {name}", "评判：{name}"],
  "let judge": ["Let the judge compare", "让评判来比较"],
  "judge going": ["{done} of {total} judged", "已评判 {done} / {total}"],
  "judge unknown": ["of {unknown} it cannot tell", "其中 {unknown} 个无法判断"],
  stop: ["Stop", "停止"],
  "kept in": ["Every verdict is a line of {file}.", "每个判断都是 {file} 中的一行。"],
});

let resultShown = false; // also after the language has changed

export async function show(root) {
  const view = { item: null, state: await call("compare/state"), waiting: false, judging: null, gone: false };
  const main = el("div", { class: "stack" });
  const result = el("section", { class: "stack", "aria-live": "polite" });
  root.append(main, result);

  function draw() {
    main.replaceChildren(...progress(view.state), ...(view.item ? question(view.item) : [waitingOrDone()]));
    const done = !view.item && !view.waiting;
    const shown = resultShown || done;
    const judge = view.state.judge ? [judgeCard(view.state)] : [];
    result.replaceChildren(
      el(
        "div", { class: "row" },
        done ? null : el(
          "button", { type: "button", class: "quiet", onclick: toggle, "aria-expanded": String(shown) },
          t(shown ? "hide result" : "show result"), el("kbd", {}, "r"),
        ),
        shown ? null : el("span", { class: "dim small" }, t("why hidden")),
      ),
      ...(shown ? [rateCard(t("your verdicts"), view.state.person, view.state.names)] : []),
      ...(shown || view.judging ? judge : []),
      el("p", { class: "dim small" }, t("kept in", { file: view.state.file })),
    );
  }

  function waitingOrDone() {
    return el("p", { class: "card dim" }, t(view.waiting ? "making replies" : "all compared"));
  }

  function question(item) {
    const reply = (side, key) => el(
      "div", { class: "card reply" },
      el("div", { class: "text mono" }, item[side]),
      el(
        "button", { type: "button", onclick: () => answer(side) },
        t(`${side} better`), el("kbd", {}, key),
      ),
    );
    return [
      el("div", { class: "card" }, el("h2", { class: "label" }, t("prompt")), el("div", { class: "text mono tall" }, item.prompt)),
      el("div", { class: "two" }, reply("left", "1"), reply("right", "2")),
      el(
        "div", { class: "row centre" },
        el("button", { type: "button", onclick: () => answer("tie") }, t("tie"), el("kbd", {}, "=")),
        el("button", { type: "button", class: "quiet", onclick: undo }, t("take back"), el("kbd", {}, "u")),
      ),
    ];
  }

  async function fetchItem(action) {
    view.item = null;
    view.waiting = true;
    draw();
    try {
      const { item, state } = await call(`compare/${action}`);
      Object.assign(view, { item, state });
    } finally {
      view.waiting = false;
      if (!view.gone) draw();
    }
  }

  async function answer(better) {
    const item = view.item;
    if (!item) return;
    view.item = null; // a second key is not for this prompt
    try {
      view.state = await call("compare/answer", { id: item.id, better });
    } catch (error) {
      view.item = item;
      throw error;
    }
    await fetchItem("next");
  }

  async function undo() {
    if (!view.waiting) await fetchItem("undo");
  }

  function toggle() {
    resultShown = !resultShown;
    draw();
  }

  function judgeCard(state) {
    const { judge, total } = state;
    const done = judge.wins + judge.losses + judge.ties + judge.unknown;
    const going = view.judging !== null;
    const button = el(
      "button", { type: "button", onclick: going ? () => view.judging.abort() : () => letJudge().catch(fail) },
      t(going ? "stop" : "let judge"),
    );
    return rateCard(
      t("the judge", { name: t(judge.name) }), judge, state.names,
      judge.means.length ? meansTable(judge.means, state.names) : null,
      el(
        "div", { class: "row" },
        done < total || going ? button : null,
        el(
          "span", { class: "dim small" },
          t("judge going", { done, total }), judge.unknown ? `, ${t("judge unknown", judge)}` : "",
        ),
      ),
    );
  }

  async function letJudge() {
    view.judging = new AbortController();
    try {
      for await (const state of stream("compare/judge", {}, view.judging.signal)) {
        view.state = state;
        if (view.gone) break;
        draw();
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      view.judging = null;
      if (!view.gone) draw();
    }
  }

  function fail(error) {
    notice(error.message, "error");
    if (!view.gone) draw();
  }

  const key = (action) => () => Promise.resolve(action()).catch(fail);
  fetchItem("next").catch(fail);
  return {
    keys: {
      1: key(() => answer("left")), 2: key(() => answer("right")), "=": key(() => answer("tie")),
      u: key(undo), r: key(toggle),
    },
    leave() {
      view.gone = true;
      view.judging?.abort();
    },
  };
}

function progress({ person, total }) {
  const done = person.wins + person.losses + person.ties;
  const bar = el("progress", { max: total, value: done, "aria-label": t("compared of", { done, total }) });
  return [el("div", { class: "progress" }, el("p", { class: "dim small" }, t("compared of", { done, total })), bar)];
}

const percent = (share) => `${Math.round(100 * share)}%`;

// A win rate on a scale from 0 to 100%, with its interval and in words; more elements follow.
function rateCard(title, rate, names, ...more) {
  const heading = el("h2", { class: "label" }, title);
  if (rate.rate === null) return el("div", { class: "card stack" }, heading, el("p", { class: "dim" }, t("no verdict yet")), ...more);
  const [a, b] = names;
  const band = el("span", { class: "band" });
  const dot = el("span", { class: "dot" });
  Object.assign(band.style, { left: percent(rate.low), right: percent(1 - rate.high) });
  dot.style.left = percent(rate.rate);
  const winner = rate.rate > 0.5 ? a : b;
  return el(
    "div", { class: "card stack" },
    heading,
    el("p", {}, el("strong", { class: "big" }, percent(rate.rate)), " ", el("span", { class: "dim name" }, t("win rate", { a, b }))),
    el("div", { class: "scale", "aria-hidden": "true" }, el("span", { class: "half" }), band, dot),
    el("p", {}, t("interval", { low: percent(rate.low), high: percent(rate.high) }), ". ", rate.decided ? t("is better", { name: winner }) : t("undecided")),
    el("p", { class: "dim small" }, t("counts", rate), rate.same ? ` · ${t("of which same", rate)}` : "", el("br"), t("method")),
    ...more,
  );
}

function meansTable(means, names) {
  return el(
    "table", {},
    el("thead", {}, el("tr", {}, el("td"), ...names.map((name) => el("th", { scope: "col", class: "name" }, name)))),
    el("tbody", {}, ...means.map(([label, ...texts]) => el("tr", {}, el("th", { scope: "row" }, t(label)), ...texts.map((text) => el("td", {}, text))))),
  );
}
