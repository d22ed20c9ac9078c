"""Who is better, who is harmful. Ballots are stored, verdicts derived; no failure, tie or time-out ever becomes a label."""
