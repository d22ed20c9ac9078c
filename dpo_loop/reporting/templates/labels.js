// A person's own grades of the candidate's answers: kept in memory, in this browser where it allows that, and given away as a file.
const labelStore = (data) => {
  const place = `dpo-loop labels ${data.run_id} ${data.round} ${data.gate_report_sha256}`;
  let labels = new Map();
  try { labels = new Map(Object.entries(JSON.parse(localStorage.getItem(place)) || {})); } catch { /* private window: memory alone */ }
  const keep = () => { try { localStorage.setItem(place, JSON.stringify(Object.fromEntries(labels))); } catch { /* as above */ } };
  const rows = () => data.samples.filter((sample) => labels.has(sample.id)).map((sample) => {
    const judged = sample.answers.candidate[1], label = labels.get(sample.id);
    return { prompt_id: sample.id, policy: "candidate", side: sample.side, category: sample.category, judged, label: label === "agree" ? judged : label };
  });
  return {
    get: (id) => labels.get(id),
    set: (id, label) => { if (label === undefined) labels.delete(id); else labels.set(id, label); keep(); },
    count: () => rows().length,
    download: () => {
      const { run_id, round, gate_report_sha256 } = data;
      const text = JSON.stringify({ run_id, round, gate_report_sha256, labels: rows() }, null, 1) + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = "labels.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    },
  };
};
