"""Each kernel agrees with its meaning in plain torch; on a CPU in Triton's interpreter and float32."""
