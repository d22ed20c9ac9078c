"""Generation: K sampled completions per prompt with vLLM, token ids in and out."""
