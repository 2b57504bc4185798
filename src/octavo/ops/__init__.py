"""What is computed, in plain PyTorch: every function here runs on a CPU and is the definition of its result."""
