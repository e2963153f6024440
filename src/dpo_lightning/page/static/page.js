// The frame: a tab for each view that the server has, the language, and keys.

import { call, el, notice, t } from "./frame.js";
import { language, setLanguage } from "./words.js";

const view = document.getElementById("view");
const tabs = document.getElementById("tabs");
const switcher = document.getElementById("language");
let names = [];
let current = {}; // what the view's show() returned: { keys: { "1": function }, leave: function }
let shows = 0;

async function show() {
  const wanted = location.hash.slice(1);
  const name = names.includes(wanted) ? wanted : names[0];
  current.leave?.();
  current = {};
  const own = ++shows;
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  switcher.textContent = t("other language");
  document.title = `${t(name)} · dpo-lightning`;
  tabs.replaceChildren(
    ...names.map((tab) => el("a", { href: `#${tab}`, "aria-current": tab === name ? "page" : null }, t(tab))),
  );
  const root = el("section", { class: name, "aria-label": t(name) });
  view.replaceChildren(root);
  const module = await import(`./${name}.js`);
  const shown = (await module.show(root)) ?? {};
  if (own === shows) current = shown;
  else shown.leave?.(); // another tab was opened meanwhile
}

function fail(error) {
  console.error(error);
  notice(error.message, "error");
}

window.addEventListener("hashchange", () => show().catch(fail));
switcher.addEventListener("click", () => {
  setLanguage(language() === "zh" ? "en" : "zh");
  show().catch(fail);
});

// A view's keys work wherever no text is being typed.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.closest("textarea, input, select, [contenteditable]")) return;
  if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
  const action = current.keys?.[event.key] ?? current.keys?.[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) action();
});

try {
  names = (await call("page/views")).views;
  await show();
} catch (error) {
  fail(error);
}
