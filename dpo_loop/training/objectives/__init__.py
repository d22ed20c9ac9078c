"""What is minimised: losses as pure functions, and the objectives that feed them: preferences, thumbs up and down, demonstrations."""
