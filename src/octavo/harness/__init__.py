"""lm-evaluation-harness with octavo's models: the model class that lm-eval calls, and tasks of `octavo evaluate`."""
