"""Triton kernels of operations in ops/: the same file and function names, for CUDA cards. The folder can be deleted."""
