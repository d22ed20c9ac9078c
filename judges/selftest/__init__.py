"""Is a judge fit to make labels? A golden set with known answers, the trials made of it, and what their results say."""
