"""Submissions, with a driver that reads what it is handed as the CUDA driver does: from memory, by address."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from expertune.kernels.launch import Descriptor, Launch
from expertune.kernels.submit import Driver, Spot, Submission

SIGNATURE = {"x_desc": "tensordesc<bf16[128, 64],L>", "y_ptr": "*bf16", "n": "i32", "scale": "fp32", "BM": "constexpr"}
SIZES = [128, 4, 4, 8, 8, 8, 4, 4, 8, 8]  # the map, its shape and strides, y, n, scale, two scratch pointers
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [128, 64], "fp4_padded": False}
FUNCTION, TOO_MANY, OUT_OF_MEMORY = 77, 1, 2


class Library:
    """`libcuda`, as far as a submission needs it. A map holds the address and what it was encoded with."""

    def __init__(self, sizes: list[int], status: int = 0) -> None:
        self.sizes, self.status = sizes, status
        self.launches: list[dict[str, Any]] = []
        self.encoded: list[dict[str, Any]] = []

    def cuFuncGetParamInfo(self, function: Any, index: Any, _offset: Any, size: Any) -> int:
        assert function.value == FUNCTION
        if index.value >= len(self.sizes):
            return TOO_MANY
        size._obj.value = self.sizes[index.value]
        return 0

    def cuTensorMapEncodeTiled(self, at: Any, kind: int, rank: int, address: Any, *rest: Any) -> int:
        dims, strides, box, steps, *numbers = rest
        self.encoded.append({
            "kind": kind, "rank": rank, "dims": [*dims], "strides": [*strides], "box": [*box], "steps": [*steps],
            "numbers": numbers,
        })  # fmt: skip
        ctypes.c_uint64.from_address(at.value).value = address.value
        return 0

    def cuTensorMapReplaceAddress(self, at: Any, address: Any) -> int:
        ctypes.c_uint64.from_address(at.value).value = address.value
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
        assert extra is None
        held = [bytes((ctypes.c_char * size).from_address(at)) for at, size in zip(arguments, self.sizes, strict=True)]
        config = config._obj
        self.launches.append({
            "grid": [*config.grid], "block": [*config.block], "shared": config.shared_bytes, "stream": config.stream,
            "function": function.value, "x": held[0][:8], "arguments": held[1:],
        })  # fmt: skip
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY"}[status]
        return 0


def _launch(n: int, **metadata: Any) -> Launch:
    asked = {
        "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False,
        "launch_pdl": False, "warp_size": 32, "num_warps": 12, "shared": 1000, "tensordesc_meta": [META],
    } | metadata  # fmt: skip
    compiled = SimpleNamespace(
        function=FUNCTION, metadata=SimpleNamespace(**asked), src=SimpleNamespace(signature=SIGNATURE)
    )
    return Launch(None, (5, 6, 1), (Descriptor((300, 64), (64, 1)),), (n, 0.5, 128), {}, compiled)


def _bytes(*values: Any) -> list[bytes]:
    return [bytes(value) for value in values]


def _expected(y: int, n: int) -> list[bytes]:
    c = ctypes
    shape = _bytes(c.c_int32(300), c.c_int32(64), c.c_int64(64), c.c_int64(1))
    return [*shape, *_bytes(c.c_uint64(y), c.c_int32(n), c.c_float(0.5), c.c_uint64(0), c.c_uint64(0))]


def test_a_launch_is_handed_over_as_the_kernel_takes_it() -> None:
    library = Library(SIZES)
    submission = Submission(Driver(library), [[(_launch(3), [Spot(0, 0), Spot(1, 32)])]])
    submission.run(0, 9, [4096, 8192])
    (launch,) = library.launches
    assert launch.pop("arguments") == _expected(8192 + 32, 3)
    assert launch == {
        "grid": [5, 6, 1],
        "block": [384, 1, 1],
        "shared": 1000,
        "stream": 9,
        "function": FUNCTION,
        "x": bytes(ctypes.c_uint64(4096)),
    }
    expected = {"kind": 9, "rank": 2, "dims": [64, 300], "strides": [128], "box": [64, 128], "steps": [1, 1]}
    assert library.encoded == [expected | {"numbers": [0, 3, 2, 0]}]


def test_later_runs_and_stretches_see_their_own_addresses() -> None:
    library = Library(SIZES)
    first = [(_launch(1), [Spot(0, 0), Spot(1, 0)]), (_launch(2), [Spot(1, 16), Spot(0, 0)])]
    submission = Submission(Driver(library), [first, [(_launch(3), [Spot(0, 0), Spot(2, 0)])]])
    seen = []
    for addresses in ([1600, 3200, 4800], [160, 320, 480]):
        submission.run(0, 0, addresses[:2])
        submission.run(1, 0, addresses)
        seen += [(launch["x"], launch["arguments"]) for launch in library.launches]
        library.launches.clear()
    pairs = [(1600, 1600 * 2), (3216, 1600), (1600, 4800), (160, 320), (336, 160), (160, 480)]
    numbers = [1, 2, 3] * 2
    assert seen == [(bytes(ctypes.c_uint64(x)), _expected(y, n)) for (x, y), n in zip(pairs, numbers, strict=True)]
    assert len(library.encoded) == 3, "encoded once; then only the address is replaced"


def test_a_stream_is_that_of_the_run() -> None:
    library = Library(SIZES)
    submission = Submission(Driver(library), [[(_launch(1), [Spot(0, 0), Spot(0, 0)])]])
    for stream in (7, 7, 8):
        submission.run(0, stream, [16])
    assert [launch["stream"] for launch in library.launches] == [7, 7, 8]


@pytest.mark.parametrize(
    ("sizes", "metadata", "says"),
    [
        (SIZES[:-1], {}, "other parameters"),
        ([*SIZES[:-3], 8, 8, 8], {}, "other parameters"),
        (SIZES, {"num_ctas": 2}, "clusters"),
        (SIZES, {"global_scratch_size": 8}, "scratch"),
        (SIZES, {"tensordesc_meta": None}, "unknown kind"),
    ],
)
def test_a_kernel_that_takes_something_else_is_refused(sizes: list[int], metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Submission(Driver(Library(sizes)), [[(_launch(1, **metadata), [Spot(0, 0), Spot(0, 0)])]])


def test_the_drivers_error_is_named() -> None:
    submission = Submission(Driver(Library(SIZES, OUT_OF_MEMORY)), [[(_launch(1), [Spot(0, 0), Spot(0, 0)])]])
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        submission.run(0, 0, [16])
