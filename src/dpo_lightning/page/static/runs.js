// Runs: every run of a folder with what became of it, newest first, and its curves while they grow.

import { call, el, notice } from "./frame.js";
import { language, withWords } from "./words.js";

const t = withWords({
  "runs in": ["Runs in {folder}: {count}", "{folder} 中的训练：{count} 次"],
  "newest of": ["The newest {count} of {found} runs in {folder}", "{folder} 中 {found} 次训练里最新的 {count} 次"],
  "no runs": ["No runs in {folder} yet: a fit appears here as soon as it begins.", "{folder} 中还没有训练：训练一开始就会出现在这里。"],
  "state running": ["running", "进行中"],
  "state finished": ["finished", "已完成"],
  "state stopped": ["stopped", "已停止"],
  "state failed": ["failed", "失败"],
  "state ended": ["ended without a report", "中断（无报告）"],
  "open report": ["Open the report", "打开报告"],
  "no curves": ["No curves yet.", "还没有曲线。"],
  "valid SQL": ["valid SQL", "有效的 SQL"],
  "exactly the wanted SQL": ["exactly the wanted SQL", "与期望的 SQL 完全一致"],
  "same result as wanted": ["same result as wanted", "结果与期望相同"],
  "exactly the wanted reply": ["exactly the wanted reply", "与期望回复完全一致"],
  "replies that end by themselves": ["replies that end by themselves", "自行结束的回复"],
  "repeated 4-grams": ["repeated 4-grams", "回复中重复的四元组"],
  "pairs with a positive margin": ["pairs with a positive margin", "差距为正的偏好对"],
  "validation loss": ["validation loss", "验证损失"],
  "training loss": ["training loss", "训练损失"],
  Loss: ["Loss", "损失"],
  "Accuracy: pairs with a positive margin": ["Accuracy: pairs with a positive margin", "准确率：差距为正的偏好对"],
  "Margin: chosen − rejected reward": ["Margin: chosen − rejected reward", "差距：优选 − 落选奖励"],
  "Rewards in training": ["Rewards in training", "训练中的奖励"],
  "Log-probs: chosen and rejected": ["Log-probs: chosen and rejected", "优选与落选的对数概率"],
  "Reference point of kto": ["Reference point of kto", "kto 的参考点"],
  "KL from the reference": ["KL from the reference", "与参考模型的 KL"],
  "Displaced: chosen less likely than before": ["Displaced: chosen less likely than before", "优选概率低于训练前的比例"],
  "Displaced first token of chosen": ["Displaced first token of chosen", "优选首词元概率下降的比例"],
  "Gradient left in the loss": ["Gradient left in the loss", "损失中剩余的梯度"],
  "Learning rate": ["Learning rate", "学习率"],
  "Gradient norm": ["Gradient norm", "梯度范数"],
  "Pairs per second": ["Pairs per second", "每秒偏好对数"],
  training: ["training", "训练"],
  validation: ["validation", "验证"],
  chosen: ["chosen", "优选"],
  rejected: ["rejected", "落选"],
  "chosen (val)": ["chosen (val)", "优选（验证）"],
  "rejected (val)": ["rejected (val)", "落选（验证）"],
  "before clipping": ["before clipping", "裁剪前"],
});

const EVERY = 3000; // milliseconds between two looks at the folder
const opened = new Set(); // ids, also after the language has changed
let fresh = true; // the newest run is opened once

export async function show(root) {
  const head = el("p", { class: "dim" });
  const list = el("div", { class: "stack" });
  const cards = new Map();
  let timer = null;
  let gone = false;
  root.append(el("div", { class: "stack" }, head, list));

  async function look() {
    const { runs, found, folder } = await call("runs/list");
    if (gone) return;
    const count = runs.length;
    head.textContent = t(!count ? "no runs" : count < found ? "newest of" : "runs in", { count, found, folder });
    if (fresh && count) {
      fresh = false;
      opened.add(runs[0].id);
    }
    for (const run of runs) {
      if (!cards.has(run.id)) cards.set(run.id, card(run.id));
      cards.get(run.id).update(run);
    }
    const wanted = runs.map((run) => cards.get(run.id).element);
    if (wanted.some((element, n) => list.children[n] !== element) || list.children.length !== count) list.replaceChildren(...wanted);
  }

  async function again() {
    try {
      await look();
      notice("");
    } catch (error) {
      notice(error.message, "error");
    }
    if (!gone) timer = setTimeout(again, EVERY);
  }

  await look();
  timer = setTimeout(again, EVERY);
  return {
    leave() {
      gone = true;
      clearTimeout(timer);
    },
  };
}

// A run's card: its summary always, its charts when it is open.
function card(id) {
  const state = el("span", { class: "state" });
  const title = el("span", { class: "title" });
  const when = el("span", { class: "dim small" });
  const outcome = el("p", { class: "dim small" });
  const tiles = el("div", { class: "tiles" });
  const link = el("a", { href: `/runs/${id}/report.html`, target: "_blank", rel: "noopener" }, t("open report"));
  const report = el("p", { hidden: true }, link);
  const charts = el("div", { class: "charts" });
  const element = el(
    "details", { class: "card run", open: opened.has(id), ontoggle: toggled },
    el("summary", {}, el("span", { class: "row" }, state, title), when),
    el("div", { class: "stack" }, outcome, tiles, report, charts),
  );
  let drawn = null;
  let latest = null;

  function toggled() {
    if (element.open) opened.add(id);
    else opened.delete(id);
    if (element.open && latest) drawCharts();
  }

  function update(run) {
    latest = run;
    state.className = `state ${run.state}`;
    state.textContent = t(`state ${run.state}`);
    title.textContent = run.title;
    const result = run.figures.slice(0, 1).map(([label, values]) => `${t(label)} ${values}`);
    when.textContent = [...result, run.name, ago(run.changed)].join(" · ");
    outcome.textContent = run.outcome;
    tiles.replaceChildren(...run.figures.map(([label, values]) => el("div", { class: "tile" }, el("strong", {}, values), el("span", { class: "dim small" }, t(label)))));
    report.hidden = !run.has_report;
    if (element.open) drawCharts();
  }

  async function drawCharts() {
    if (drawn === latest.changed) return;
    drawn = latest.changed;
    try {
      const { plots } = await call("runs/curves", { id });
      charts.replaceChildren(...(plots.length ? plots.map(chart) : [el("p", { class: "dim small" }, t("no curves"))]));
    } catch (error) {
      charts.replaceChildren(el("p", { class: "dim small" }, error.message));
    }
  }

  return { element, update };
}

function ago(seconds) {
  const past = seconds - Date.now() / 1000;
  const units = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
  const [unit, size] = units.find(([, length]) => -past >= length) ?? units.at(-1);
  const format = new Intl.RelativeTimeFormat(language() === "zh" ? "zh-CN" : "en", { numeric: "auto" });
  return format.format(Math.min(0, Math.round(past / size)), unit);
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A chart that the server has laid out: axes, and lines in the colours of the page.
function chart(plot) {
  const titled = (element, text) => {
    element.append(svg("title", {}, text));
    return element;
  };
  const { width, height, left, right } = plot;
  const drawing = svg(
    "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t(plot.title) },
    ...plot.y_labels.flatMap(([y, label]) => [
      svg("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }),
      svg("text", { x: left - 6, y, dy: 4, "text-anchor": "end" }, label),
    ]),
    ...plot.x_labels.map(([x, label]) => svg("text", { x, y: height - 8, "text-anchor": "middle" }, label)),
    ...plot.series.flatMap((line) => [
      svg("polyline", {
        points: line.points.map(({ x, y }) => `${x},${y}`).join(" "), class: `series-${line.colour}`,
        "stroke-width": line.width, "stroke-dasharray": line.dash,
      }),
      ...line.points.map(({ x, y, label }) => titled(
        svg("circle", { cx: x, cy: y, r: line.radius || 2, class: `series-${line.colour}` }), `${t(line.name)}, ${label}`,
      )),
    ]),
    ...plot.ends.map(({ y, name, colour }) => svg("text", { x: right + 8, y, dy: 4, class: `end-${colour}` }, t(name))),
  );
  const legend = plot.ends.length ? [] : plot.series;
  return el(
    "figure", {},
    el("figcaption", {}, el("strong", {}, t(plot.title)), ...legend.map((line) => el("span", { class: "legend" }, el("i", { class: `series-${line.colour}` }), t(line.name)))),
    drawing,
    el("p", { class: "dim small" }, t(plot.good)),
  );
}
