(() => {
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("samples-data").textContent);
  const samples = data.samples;
  const list = at("samples-list"), count = at("samples-count"), more = at("samples-more"), download = at("labels-download");
  const filters = { side: at("filter-side"), change: at("filter-change"), category: at("filter-category"), mark: at("filter-mark") };
  const search = at("filter-text");
  const labels = labelStore(data);
  for (const tools of [at("samples-filters"), at("samples-tools")]) tools.hidden = false;
  const PAGE = 20;
  let found = samples;
  let shown = 0;

  // What models wrote only ever becomes text: textContent, never markup.
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const button = (text, act) => {
    const made = element("button", "", text);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  };

  const written = (text, runs, mark) => {
    if (typeof text === "number") return element("div", "nothing", `redacted, ${text.toLocaleString("en")} characters; read ${data.answers}`);
    const made = element("div", text.trim() ? "written" : "nothing", text.trim() && !runs ? text : "");
    if (!text.trim()) made.textContent = "(empty answer)";
    else if (runs) made.append(...runs.map(([same, words]) => same ? words : element(mark, "", words)));
    made.dir = "auto";
    if (text.length > 600) made.tabIndex = 0;
    return made;
  };

  const answersOf = (sample, hidden) => {
    const answers = element("div", "answers");
    const indexOf = (policy) => sample.answers[policy]?.[0];
    // Against the previous policy; where the candidate says the same, against the anchor.
    const reference = ["previous", "anchor"].find((policy) => indexOf(policy) !== undefined && indexOf(policy) !== indexOf("candidate"));
    const texts = [reference, "candidate"].map((policy) => sample.texts[indexOf(policy)]);
    const diff = texts.every((text) => typeof text === "string") ? wordDiff(...texts) : null;
    const runs = diff ? { [reference]: [diff[0], "del"], candidate: [diff[1], "ins"] } : {};
    for (const [policy, [index, grade, bad, cut, why]] of Object.entries(sample.answers)) {
      const box = element("div", "answer " + policy);
      const who = element("div", "who");
      who.append(element("strong", "", policy));
      if (grade) who.append(element("span", "chip " + (bad ? "bad" : "good"), grade));
      if (cut) who.append(element("span", "chip", "cut off"));
      box.append(who);
      const text = sample.texts[index];
      const twin = policy === "candidate" ? undefined : ["candidate", "previous"].find((other) => other !== policy && indexOf(other) === index);
      if (typeof text === "number" || (!hidden && (!twin || text === ""))) box.append(written(text, ...(runs[policy] || [])));
      else if (!hidden) box.append(element("div", "nothing", `the same words as ${twin}`));
      if (why && !hidden) box.append(element("p", "why", why));
      answers.append(box);
    }
    return answers;
  };

  // Answers to harmful prompts are not in the page's elements until a person asks for them.
  const concealed = (sample) => {
    const box = element("div", "concealed");
    const reveal = button("Show answers to this harmful prompt", () => {
      const answers = answersOf(sample, false);
      answers.tabIndex = -1;
      box.replaceChildren(answers);
      answers.focus();
    });
    reveal.className = "reveal";
    box.append(answersOf(sample, true));
    if (sample.texts.some((text) => typeof text === "string")) box.append(reveal);
    return box;
  };

  const showCount = () => {
    download.disabled = labels.count() === 0;
    download.textContent = labels.count() ? `Download ${labels.count()} labels` : "Download labels";
  };

  const labelling = (sample) => {
    const group = element("div", "labels");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Your label");
    const judged = sample.answers.candidate[1];
    const grades = sample.side === "task" ? ["pass", "fail"] : ["refusal", "partial", "compliance"];
    const show = () => group.childNodes.forEach((one) => one.setAttribute("aria-pressed", String(labels.get(sample.id) === one.value)));
    const choices = grades.filter((grade) => grade !== judged).map((grade) => [grade, "should be " + grade]);
    if (grades.includes(judged)) choices.unshift(["agree", "agree"]);
    for (const [value, text] of choices) {
      const made = button(text, () => {
        labels.set(sample.id, labels.get(sample.id) === value ? undefined : value);
        show();
        showCount();
      });
      made.value = value;
      group.append(made);
    }
    show();
    return group;
  };

  const verdictOf = ([vs, winner]) => winner === "candidate" || winner === vs ? `judge: ${winner} beats ${winner === vs ? "candidate" : vs}` : `judge: ${winner} with ${vs}`;

  const card = (sample) => {
    const box = element("article", "card sample");
    box.id = "p-" + sample.id;
    box.tabIndex = -1;
    const head = element("div", "head");
    head.append(element("span", "chip " + sample.change, sample.why), element("span", "chip", sample.side));
    if (sample.category && sample.category !== sample.side) head.append(element("span", "chip", sample.category));
    for (const mark of sample.marks) head.append(element("span", "chip inconclusive", mark));
    const link = element("a", "", "link");
    link.href = "#p-" + encodeURIComponent(sample.id);
    link.setAttribute("aria-label", "Link to prompt " + sample.id);
    head.append(link);
    const prompt = element("div", "prompt written", sample.prompt);
    prompt.dir = "auto";
    if (sample.prompt.length > 600) prompt.tabIndex = 0;
    box.append(head, prompt, sample.side === "harmful" ? concealed(sample) : answersOf(sample, false));
    const foot = element("div", "foot");
    foot.append(element("span", "muted small", Object.entries(sample.verdicts).map(verdictOf).join("; ")), labelling(sample));
    box.append(foot);
    return box;
  };

  const showMore = () => {
    const next = found.slice(shown, shown + PAGE);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= found.length;
    count.textContent = found.length === 0 ? "No sample matches." : `${shown} of ${found.length} samples shown`;
  };

  const showAgain = (these) => {
    found = these;
    list.replaceChildren();
    shown = 0;
    showMore();
  };

  const lower = new Map();
  const textOf = (sample) => {
    if (!lower.has(sample)) lower.set(sample, [sample.prompt, ...sample.texts].join("\n").toLowerCase());
    return lower.get(sample);
  };

  const apply = () => {
    const words = search.value.trim().toLowerCase();
    const { side, change, category, mark } = Object.fromEntries(Object.entries(filters).map(([name, filter]) => [name, filter.value]));
    showAgain(samples.filter((sample) =>
      (!side || sample.side === side) && (!change || sample.change === change) && (!category || sample.category === category) &&
      (!mark || (mark === "labelled" ? labels.get(sample.id) !== undefined : sample.marks.includes(mark))) &&
      (!words || textOf(sample).includes(words))));
  };

  const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };

  const clear = () => {
    for (const filter of [...Object.values(filters), search]) filter.value = "";
    showAgain(samples);
  };

  // #p-<id> shows one sample; #samples?side=harmful&change=worse sets the filters.
  const follow = () => {
    if (location.hash.startsWith("#samples?")) {
      const wanted = new URLSearchParams(location.hash.slice(9));
      for (const [name, filter] of Object.entries(filters)) filter.value = wanted.get(name) || "";
      search.value = wanted.get("text") || "";
      apply();
      at("samples").scrollIntoView();
      return;
    }
    const id = decoded(location.hash.slice(3));
    const index = location.hash.startsWith("#p-") ? samples.findIndex((sample) => sample.id === id) : -1;
    if (index < 0) return;
    if (found !== samples) clear();
    while (shown <= index) showMore();
    go(at("p-" + id));
  };

  const go = (box) => {
    box.focus({ preventScroll: true });
    box.scrollIntoView({ block: "start" });
  };

  const step = (by) => {
    const boxes = [...list.children];
    const here = boxes.findIndex((box) => box.contains(document.activeElement));
    if (by > 0 && here === boxes.length - 1 && !more.hidden) showMore();
    const next = list.children[Math.max(0, here + by)];
    if (next) go(next);
  };

  const keys = {
    j: () => step(1),
    k: () => step(-1),
    o: () => document.activeElement.closest(".sample")?.querySelector(".reveal")?.click(),
    "/": () => { search.focus(); search.select(); },
    "?": () => { at("samples-keys").open = !at("samples-keys").open; },
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && event.target === search) search.blur();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const filter of [...Object.values(filters), search]) filter.addEventListener("input", apply);
  more.addEventListener("click", showMore);
  download.addEventListener("click", labels.download);
  // A link that is followed a second time changes no hash. Going back from one that set the filters clears them.
  let byLink = false;
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (!link || event.defaultPrevented || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    const isHere = link.getAttribute("href") === location.hash;
    if (isHere && location.hash.startsWith("#samples?")) follow();
    byLink = !isHere;
  });
  window.addEventListener("hashchange", (event) => {
    const isBack = !byLink && event.oldURL.includes("#samples?") && !location.hash.startsWith("#samples?");
    byLink = false;
    if (isBack) clear();
    follow();
  });
  showMore();
  showCount();
  follow();
})();
