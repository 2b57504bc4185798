"""Triton kernels of the references in ops/, with the same file and function names. The folder can be deleted."""
