// A person's own grades of the candidate's answers: kept in memory, in this browser where it allows that, and given away as a file for their own
// records. A row has what it takes to become one of a judge canary later: hashes of prompt and answer, and the answer where the page has it unchanged.
const labelStore = (data) => {
  const place = `dpo-loop labels 2 ${data.run_id} ${data.round} ${data.gate_report_sha256}`;
  let labels = new Map();
  try { labels = new Map(Object.entries(JSON.parse(localStorage.getItem(place)) || {})); } catch { /* private window: memory alone */ }
  const keep = () => { try { localStorage.setItem(place, JSON.stringify(Object.fromEntries(labels))); } catch { /* as above */ } };
  const rows = () => data.samples.filter((sample) => labels.has(sample.id)).map((sample) => {
    const [index, judged] = sample.answers.candidate, { label, labelled_at } = labels.get(sample.id);
    const [prompt_sha256, response_sha256] = sample.sha256;
    const row = { prompt_id: sample.id, prompt_sha256, policy: "candidate", side: sample.side, category: sample.category, judged, label: label === "agree" ? judged : label, labelled_at };
    if (response_sha256) row.response_sha256 = response_sha256;
    if (sample.exact) row.response = sample.texts[index];
    return row;
  });
  return {
    get: (id) => labels.get(id)?.label,
    set: (id, label) => { if (label === undefined) labels.delete(id); else labels.set(id, { label, labelled_at: new Date().toISOString() }); keep(); },
    count: () => rows().length,
    download: () => {
      const { run_id, round, gate_report_sha256 } = data;
      const about = "A person's grades of the candidate's answers, for their own records: nothing in dpo-loop reads this file. Hashes are of UTF-8.";
      const text = JSON.stringify({ about, run_id, round, gate_report_sha256, labels: rows() }, null, 1) + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = "labels.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    },
  };
};
