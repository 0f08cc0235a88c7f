"""The fast path computes what the plain one does; on a CPU in Triton's interpreter and float32."""

import tests.kernels  # noqa: F401 - sets up the interpreter before a kernel is defined
