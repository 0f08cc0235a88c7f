"""The fast path computes what the plain one does; on a CPU in Triton's interpreter and float32."""
