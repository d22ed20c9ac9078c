"""The tiny world: verifiable tasks, demonstrations and a small model, so that the loop is real without a GPU, a key or a download."""
