"""Text from a model: sampling rules, and the engine that runs prompt and continuation over a cache."""
