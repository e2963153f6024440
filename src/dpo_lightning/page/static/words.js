// All words of the page, in English and Chinese. {name} is filled in.

const WORDS = {
  "other language": ["中文", "English"],
  // tabs
  label: ["Label", "标注"],
  compare: ["Compare", "对比"],
  chat: ["Chat", "对话"],
  runs: ["Runs", "训练记录"],
  // Label
  "rows": ["{count} labels in {output}", "{output} 中已有 {count} 条标注"],
  "left": ["{count} prompts left", "还剩 {count} 个提示"],
  "ties": ["{count} ties", "{count} 个平局"],
  "skips": ["{count} skipped", "跳过 {count} 个"],
  "same": ["{count} left out, as both replies are the same", "{count} 个因两个回复相同而略过"],
  "by": ["by {labeller}", "标注者：{labeller}"],
  "progress": ["Prompts labelled", "标注进度"],
  "reply": ["Reply {number}", "回复 {number}"],
  "the reply": ["The reply", "回复"],
  "better": ["This one is better", "这个更好"],
  "good": ["Good", "好"],
  "bad": ["Bad", "不好"],
  "tie": ["Equally good", "一样好"],
  "skip": ["Skip", "跳过"],
  "edit": ["Correct a reply", "修改回复"],
  "edit which": ["Which reply do you want to correct? Press 1 or 2, or Esc.", "要修改哪个回复？按 1 或 2，按 Esc 取消。"],
  "edit this": ["Correct this one", "修改这个"],
  "edit help": ["Your text becomes the better one of a pair, and the reply the other.", "修改后的文本将作为更好的回复，原回复作为较差的回复。"],
  "edit help thumbs": ["Your text is kept as a good reply.", "修改后的文本将作为好的回复保存。"],
  "save": ["Save", "保存"],
  "cancel": ["Cancel", "取消"],
  "undo": ["Undo", "撤销"],
  "cut off": ["cut off at the length limit", "达到长度上限而截断"],
  "empty": ["(an empty reply)", "（空回复）"],
  "show all": ["Show all {count} characters", "显示全部 {count} 个字符"],
  "waiting": ["The next replies are being made …", "正在生成下一组回复……"],
  "all done": ["All prompts are labelled", "所有提示都已标注"],
  "train now": ["Train on them with: fit --data.train_dataset {output}", "用它训练：fit --data.train_dataset {output}"],
  "problem": ["No more replies can be made", "无法继续生成回复"],
  "nothing to undo": ["This tab has no click to undo", "此标签页没有可撤销的操作"],
  "refused decided": ["Another tab had labelled that prompt already: your click is not counted", "另一个标签页已标注过该提示：这次点击未计入"],
  "refused changed": ["The replies are made anew since the server was started with other settings: please choose again", "服务器以不同设置重新启动，回复已重新生成：请重新选择"],
  "server gone": ["The server does not answer. Is it still running? Trying again …", "服务器没有响应。它还在运行吗？正在重试……"],
  "server gone, click kept": ["The server does not answer. Your click is kept, and sent when it is back.", "服务器没有响应。您的点击已保留，恢复后将自动发送。"],
  "server back": ["The server is back, and nothing was lost", "服务器已恢复，没有丢失任何内容"],
  // verdicts of judges
  "valid": ["valid", "有效"],
  "exact": ["exact", "完全一致"],
  "same result": ["same result", "结果相同"],
  "matches": ["matches", "匹配"],
  "fits the schema": ["fits the schema", "符合模式"],
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
export const t = withWords({});

// The words of a view, as t, before those for all views: const t = withWords({ stop: ["Stop", "停止"] });
export function withWords(own) {
  return (key, values = {}) => {
    const found = [own, WORDS].find((words) => Object.hasOwn(words, key));
    const words = found ? found[key][current === "zh" ? 1 : 0] : key;
    return words.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
  };
}
