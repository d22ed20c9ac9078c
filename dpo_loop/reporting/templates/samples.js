"use strict";
(() => {
  const samples = JSON.parse(document.getElementById("samples-data").textContent);
  const list = document.getElementById("samples-list");
  const count = document.getElementById("samples-count");
  const more = document.getElementById("samples-more");
  const side = document.getElementById("filter-side");
  const change = document.getElementById("filter-change");
  const search = document.getElementById("filter-text");
  const PAGE = 30;
  let found = samples;
  let shown = 0;

  // What models wrote only ever becomes text: textContent, never markup.
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const written = (text) => {
    const made = element("div", text.trim() ? "written" : "nothing", text.trim() ? text : "(empty answer)");
    made.dir = "auto";
    return made;
  };

  const answer = (policy, [text, grade, bad, cut], hidden) => {
    const box = element("div", "answer " + policy);
    const who = element("div", "who");
    who.append(element("strong", "", policy), element("span", "chip " + (bad ? "bad" : "good"), grade));
    if (cut) who.append(element("span", "chip", "cut off"));
    box.append(who);
    if (!hidden) box.append(written(text));
    return box;
  };

  const answersOf = (sample, hidden) => {
    const answers = element("div", "answers");
    for (const [policy, row] of Object.entries(sample.answers)) answers.append(answer(policy, row, hidden));
    return answers;
  };

  // Answers to harmful prompts are not in the page's elements until a person asks for them.
  const concealed = (sample) => {
    const box = element("div", "concealed");
    const reveal = element("button", "", "Show answers to this harmful prompt");
    reveal.type = "button";
    reveal.addEventListener("click", () => {
      const answers = answersOf(sample, false);
      answers.tabIndex = -1;
      box.replaceChildren(answers);
      answers.focus();
    });
    box.append(answersOf(sample, true), reveal);
    return box;
  };

  const card = (sample) => {
    const box = element("article", "card sample");
    box.id = "p-" + sample.id;
    const head = element("div", "head");
    head.append(element("span", "chip " + sample.change, sample.why), element("span", "chip", sample.side));
    if (sample.category && sample.category !== sample.side) head.append(element("span", "chip", sample.category));
    const link = element("a", "", "link");
    link.href = "#p-" + sample.id;
    link.setAttribute("aria-label", "Link to prompt " + sample.id);
    head.append(link);
    const prompt = element("div", "prompt written", sample.prompt);
    prompt.dir = "auto";
    box.append(head, prompt, sample.side === "harmful" ? concealed(sample) : answersOf(sample, false));
    return box;
  };

  const showMore = () => {
    const next = found.slice(shown, shown + PAGE);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= found.length;
    count.textContent = found.length === 0 ? "No sample matches." : `${shown} of ${found.length} samples shown`;
  };

  const matches = (sample, words) =>
    (!side.value || sample.side === side.value) &&
    (!change.value || sample.change === change.value) &&
    (!words || sample.prompt.toLowerCase().includes(words) ||
      Object.values(sample.answers).some((row) => row[0].toLowerCase().includes(words)));

  const apply = () => {
    const words = search.value.trim().toLowerCase();
    found = samples.filter((sample) => matches(sample, words));
    list.replaceChildren();
    shown = 0;
    showMore();
  };

  const follow = () => {
    const id = location.hash.slice(3);
    const at = location.hash.startsWith("#p-") ? samples.findIndex((sample) => sample.id === id) : -1;
    if (at < 0) return;
    if (found !== samples) {
      side.value = change.value = search.value = "";
      found = samples;
      list.replaceChildren();
      shown = 0;
    }
    while (shown <= at) showMore();
    document.getElementById("p-" + id).scrollIntoView();
  };

  for (const filter of [side, change, search]) filter.addEventListener("input", apply);
  more.addEventListener("click", showMore);
  window.addEventListener("hashchange", follow);
  showMore();
  follow();
})();
