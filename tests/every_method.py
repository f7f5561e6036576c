"""One quick quantizer of each method, for tests of what all of them have to do."""

from collections.abc import Callable

from onecomp.quantizer import GPTQ, QUIP, RTN, Quantizer

METHODS: dict[str, Callable[..., Quantizer]] = {
    "gptq": lambda **more: GPTQ(groupsize=16, mse=True, q_grid=20, **more),
    "quip": lambda **more: QUIP(wbits=3, **more),
    "rtn": lambda **more: RTN(groupsize=16, **more),
}
