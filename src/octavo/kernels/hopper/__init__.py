"""Kernels for one generation of cards, H100 and H200 (compute capability 9.0), in Gluon, Triton's experimental form.

Its names change between versions of Triton, so these files are imported only where they run (ops/twins.gluon_runs_on).
"""
