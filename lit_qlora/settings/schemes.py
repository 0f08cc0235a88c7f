"""The ways to store frozen weights."""

from typing import Literal, get_args

Scheme = Literal["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
