"""Triton kernels of the memory: `impl="triton"`."""
