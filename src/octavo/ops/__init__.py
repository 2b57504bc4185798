"""The mathematics, in plain PyTorch: every function runs on a CPU and is the reference of its kernel, if it has one."""
