"""One quick quantizer of each method, for tests of what all of them have to do."""

from collections.abc import Callable

from onecomp.quantizer import ARB, CQ, DBF, GPTQ, QBB, QUIP, RTN, JointQ, Onebit, Quantizer

METHODS: dict[str, Callable[..., Quantizer]] = {
    "arb": lambda **more: ARB(arb_iters=2, **more),
    "cq": lambda **more: CQ(refine_iters=2, **more),
    "dbf": lambda **more: DBF(target_bits=1.2, iters=4, **more),
    "gptq": lambda **more: GPTQ(groupsize=16, mse=True, q_grid=20, **more),
    "jointq": lambda **more: JointQ(bits=3, group_size=16, num_restarts=1, **more),
    "onebit": lambda **more: Onebit(iters=2, **more),
    "qbb": lambda **more: QBB(wbits=2, iters_per_basis=2, **more),
    "quip": lambda **more: QUIP(wbits=3, **more),
    "rtn": lambda **more: RTN(groupsize=16, **more),
}
