"""Each kernel agrees with its meaning in plain torch; on a CPU in Triton's interpreter and float32."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
