// All words of the page, in English and Chinese. {name} is filled in.

const WORDS = {
  "other language": ["中文", "English"],
  // tabs
  label: ["Label", "标注"],
  compare: ["Compare", "对比"],
  chat: ["Chat", "对话"],
  runs: ["Runs", "训练记录"],
};

const KEY = "dpo-lightning-language";

function stored() {
  try { return localStorage.getItem(KEY); } catch { return null; } // storage may be switched off
}

let current = stored() ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

export const language = () => current;

export function setLanguage(chosen) {
  current = chosen;
  try { localStorage.setItem(KEY, chosen); } catch { /* it is kept until the page is closed */ }
}

// The words for a key: t("labelled", { count: 3 }). A key without words is returned as it is.
export function t(key, values = {}) {
  const words = Object.hasOwn(WORDS, key) ? WORDS[key][current === "zh" ? 1 : 0] : key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

// Adds the words of a view, such as { stop: ["Stop", "停止"] }.
export function addWords(words) {
  Object.assign(WORDS, words);
}
