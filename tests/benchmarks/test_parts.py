"""Kernels are counted to the part of a step that runs them."""

import re
from pathlib import Path

import pytest

import expertune
from parts import PARTS, THE_REST, part_of, sum_by_part

NAMES = {
    "void kOptimizerStatic8bit2StateBlockwise<float, 0, 256, 1>(f": "optimizer",
    "_adamw_8bit_kernel": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<": "optimizer",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "_attention_keys_kernel": "attention",
    "_attention_queries_kernel": "attention",
    "_attention_products_kernel": "attention",
    "_attention_row_sums_kernel": "attention",
    "_attention_spans_kernel": "attention",
    "_attention_forward_kernel": "attention",
    "_linear_kernel": "experts",
    "_forward_kernel": "experts",
    "_repack_kernel": "experts",
    "_route_backward_kernel": "experts",
    "_balance_backward_kernel": "experts",
    "_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm": "experts",
    "nvjet_sm90_tst_192x208_64x4_1x2_h_bz_coopB_TNT": "dense products",
    "_norm_kernel": "the rest",
    "_norm_backward_kernel": "the rest",
    "_rotary_kernel": "the rest",
    "Memcpy DtoD (Device -> Device)": "the rest",
}


@pytest.mark.parametrize(("kernel", "part"), NAMES.items())
def test_a_kernel_has_its_part(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_the_rest_of_ours_is_norms_rotary_embeddings_heads_and_the_loss() -> None:
    sources = Path(expertune.__file__).parent.rglob("*.py")
    kernels = {
        name for path in sources for name in re.findall(r"def (_\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }
    assert {name for name in kernels if part_of(name) == THE_REST} == {
        "_assemble_kernel",
        "_log_probs_kernel",
        "_norm_and_turn_kernel",
        "_norm_backward_kernel",
        "_norm_kernel",
        "_rotary_kernel",
        "_take_apart_kernel",
        "_turn_and_norm_backward_kernel",
    }


def test_milliseconds_are_added_up() -> None:
    kernels = [("_linear_kernel", 1.25), ("_combine_kernel", 0.5), ("_norm_kernel", 0.25)]
    assert sum_by_part(kernels) == dict.fromkeys(PARTS, 0) | {"experts": 1.75, "the rest": 0.25}
