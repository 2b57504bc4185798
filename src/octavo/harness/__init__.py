"""lm-evaluation-harness over octavo's models: the class that it asks, and its tasks in `octavo evaluate`."""
