"""Fused operations of the fast path: a file an operation, its meaning in plain torch first, then the Triton kernel.

On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested there; it rounds
bfloat16 wrongly, so tests in 16 bit belong on a GPU.
"""
