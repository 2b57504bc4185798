"""Kernels for Hopper GPUs (H100 and H200, compute capability 9.0) in Gluon, Triton's lower-level language.

Gluon's names change between versions of Triton, so these files are imported only where they run
(runtime/dispatch.hopper_kernels_run_on).
"""
