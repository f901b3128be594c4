"""Which part of a step a GPU kernel belongs to, by its name."""

import re

THE_REST = "the rest"
# in this order: what an expression finds first. The head's products have the names of all dense products.
_KERNELS = {
    "optimizer": r"kOptimizer|multi_tensor|_adamw|_grad_norm|_clip_coef",
    "attention": r"sdpa|flash|fmha|attention",
    "experts": r"^_(linear|shrink|outer|repack|combine|count|add_up|place|forward|backward|gate|plain|sum_parts|weigh"
    r"|ping_pong|route|balance)\w*kernel|grouped|enable_3x_kernel|_moe_|gather",
    "dense products": r"nvjet|gemm|cutlass|cublas|splitK|_low_rank",
}
PARTS = (*_KERNELS, THE_REST)


def part_of(kernel: str) -> str:
    """The part of a step that runs this kernel; norms, elementwise work and copies are "the rest"."""
    return next((part for part, names in _KERNELS.items() if re.search(names, kernel)), THE_REST)


def sum_by_part(kernels: list[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each part, from kernels' names and milliseconds."""
    sums = dict.fromkeys(PARTS, 0.0)
    for name, ms in kernels:
        sums[part_of(name)] += ms
    return {part: round(ms, 2) for part, ms in sums.items()}
