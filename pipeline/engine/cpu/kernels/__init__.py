"""Compute on a CPU in bf16 by kernels that numba compiles; README.md says how."""
