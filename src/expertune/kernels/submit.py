"""Submit: the launches of a program, kept as the CUDA driver reads them.

Triton's launcher builds a launch's arguments anew each time, in Python where tensor-memory descriptors are among them:
20 µs a launch on the machine measured. Between two runs of a program only addresses differ. So the arguments of all its
launches are laid out once, each pointer in a slot of one table, and a run fills the table and hands the driver what
lies there. (The idea of a CUDA graph's kernel nodes, without the graph.)

What is laid out is checked against what the driver says that the kernel takes; where the two differ, or the driver is
older than 12.4 and does not say, there is no submission, and the launches are made by Triton.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from expertune.kernels.launch import Launch, ceil_div

_SUCCESS = 0
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
# of CUtensorMapDataType; what Triton's own numbers say differs between its host and its device
_DTYPES = {"fp16": 6, "fp32": 7, "bf16": 9}
_L2_PROMOTION_128B = 2
_NUMBERS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class Spot(NamedTuple):
    """Where a pointer points: the number of a tensor, and bytes from its start."""

    place: int
    offset: int


class _Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Driver:
    """The functions of the CUDA driver that a submission calls.

    Args:
        library: `libcuda`.
    """

    def __init__(self, library: Any) -> None:
        self.launch = library.cuLaunchKernelEx
        self.replace_address = library.cuTensorMapReplaceAddress
        self._encode = library.cuTensorMapEncodeTiled
        self._parameter = library.cuFuncGetParamInfo
        self._name = library.cuGetErrorName

    def check(self, status: int) -> None:
        """Raise RuntimeError unless `status` is success."""
        if status != _SUCCESS:
            name = ctypes.c_char_p()
            self._name(status, ctypes.byref(name))
            raise RuntimeError(f"CUDA error while submitting a kernel: {(name.value or b'unknown').decode()}")

    def parameter_sizes(self, function: int) -> list[int]:
        """Bytes of each parameter of a kernel."""
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        arguments = (ctypes.byref(offset), ctypes.byref(size))
        while self._parameter(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), *arguments) == _SUCCESS:
            sizes.append(size.value)
        return sizes

    def encode(self, at: int, address: int, kind: int, shape: Sequence[int], meta: dict[str, Any]) -> None:
        """Write the `CUtensorMap` of a two-dimensional row-major matrix to the address `at`."""
        (rows, width), (box_rows, box_width) = shape, meta["block_size"]
        status = self._encode(
            ctypes.c_void_p(at),
            kind,
            2,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(width, rows),
            (ctypes.c_uint64 * 1)(width * meta["elem_size"]),
            (ctypes.c_uint32 * 2)(box_width, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),
            0,  # not interleaved
            meta["swizzle"],
            _L2_PROMOTION_128B,
            0,  # zeros beyond the matrix
        )
        self.check(status)


@cache
def driver() -> Driver | None:
    """The driver of this machine, or None where it lacks a function that is needed."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):
        return None


class _Map:
    """A `CUtensorMap` in memory, with the address that it was last made for."""

    def __init__(self, driver: Driver, spot: Spot, kind: int, shape: Sequence[int], meta: dict[str, Any]) -> None:
        self.spot = spot
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        self.at = ceil_div(ctypes.addressof(self._memory), _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        self._pointer = ctypes.c_void_p(self.at)
        self._driver, self._form = driver, (kind, shape, meta)
        self._address: int | None = None

    def point(self, address: int) -> None:
        """Make it for this address."""
        if self._address is None:
            self._driver.encode(self.at, address, *self._form)
        elif address != self._address:
            self._driver.check(self._driver.replace_address(self._pointer, ctypes.c_void_p(address)))
        self._address = address


class _Stretch(NamedTuple):
    """What is new to one stretch of launches, and the launches, each as the driver takes it."""

    slots: slice
    spots: list[Spot]
    maps: list[_Map]
    calls: list[tuple[Any, Any, Any, None]]


class Submission:
    """Launches in order, cut into stretches that are run one after another.

    Args:
        driver: whose functions are called.
        stretches: of each its launches, and of each launch where its descriptors and tensors point.

    Raises:
        ValueError: a launch cannot be laid out.
    """

    def __init__(self, driver: Driver, stretches: Sequence[Sequence[tuple[Launch, Sequence[Spot]]]]) -> None:
        self._driver = driver
        self._stream = 0
        self._configs: list[_Config] = []
        self._kept: list[Any] = []  # memory that only addresses refer to
        places = [spot for stretch in stretches for _, spots in stretch for spot in spots]
        self._table = (ctypes.c_uint64 * (len(set(places)) + 1))()  # the last slot stays null
        self._slots: dict[Spot, int] = {}
        self._stretches = [self._lay_out(stretch) for stretch in stretches]

    def run(self, number: int, stream: int, addresses: Sequence[int]) -> None:
        """Submit one stretch.

        Args:
            number: of the stretch.
            stream: a CUDA stream of the current device.
            addresses: of each place, as far as this stretch and those before it point to it.
        """
        if stream != self._stream:
            self._stream = stream
            for config in self._configs:
                config.stream = stream
        slots, spots, maps, calls = self._stretches[number]
        self._table[slots] = [addresses[place] + offset for place, offset in spots]
        for tensor_map in maps:
            place, offset = tensor_map.spot
            tensor_map.point(addresses[place] + offset)
        launch = self._driver.launch
        for call in calls:
            if status := launch(*call):
                self._driver.check(status)

    def _lay_out(self, stretch: Sequence[tuple[Launch, Sequence[Spot]]]) -> _Stretch:
        first = len(self._slots)
        maps: list[_Map] = []
        calls = [self._call(made, spots, maps) for made, spots in stretch]
        new = list(self._slots)[first:]
        return _Stretch(slice(first, first + len(new)), new, maps, calls)

    def _call(self, made: Launch, spots: Sequence[Spot], maps: list[_Map]) -> tuple[Any, Any, Any, None]:
        compiled = made.compiled
        assert compiled is not None
        metadata = compiled.metadata
        if why := _why_not(metadata):
            raise ValueError(why)
        config = _Config(
            grid=made.grid,
            block=(metadata.warp_size * metadata.num_warps, 1, 1),
            shared_bytes=metadata.shared,
        )
        sizes, addresses = self._arguments(made, spots, maps)
        if sizes != self._driver.parameter_sizes(compiled.function):
            raise ValueError("the kernel takes other parameters than expected")
        arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._configs.append(config)
        self._kept += [arguments, compiled]
        return ctypes.byref(config), ctypes.c_void_p(compiled.function), arguments, None

    def _arguments(self, made: Launch, spots: Sequence[Spot], maps: list[_Map]) -> tuple[list[int], list[int]]:
        """Of each parameter its size, and the address at which its value lies."""
        sizes, addresses = [], []
        pointers, descriptors, values = iter(spots), iter(made.descriptors), iter(made.values)
        metas = iter(made.compiled.metadata.tensordesc_meta or ())

        def add(value: Any) -> None:
            self._kept.append(value)
            sizes.append(ctypes.sizeof(value))
            addresses.append(ctypes.addressof(value))

        for kind in made.compiled.src.signature.values():
            if kind == "constexpr":
                next(values)
            elif kind.startswith("*"):
                sizes.append(ctypes.sizeof(ctypes.c_void_p))
                addresses.append(self._slot(next(pointers)))
            elif kind.startswith("tensordesc"):
                descriptor, meta = next(descriptors), next(metas, None)
                element = re.match(r"tensordesc<(\w+)\[", kind)
                if element is None or element[1] not in _DTYPES or meta is None or len(descriptor.shape) != 2:
                    raise ValueError(f"a descriptor of an unknown kind: {kind}")
                tensor_map = _Map(self._driver, next(pointers), _DTYPES[element[1]], descriptor.shape, meta)
                maps.append(tensor_map)
                sizes.append(_MAP_BYTES)
                addresses.append(tensor_map.at)
                for size in descriptor.shape:
                    add(ctypes.c_int32(size))
                for stride in descriptor.strides:
                    add(ctypes.c_int64(stride))
            elif kind in _NUMBERS:
                add(_NUMBERS[kind](next(values)))
            else:
                raise ValueError(f"a parameter of an unknown kind: {kind}")
        null = ctypes.addressof(self._table) + ctypes.sizeof(self._table) - ctypes.sizeof(ctypes.c_uint64)
        for _ in range(2):  # scratch memory of the kernel and of Triton's profiler
            sizes.append(ctypes.sizeof(ctypes.c_void_p))
            addresses.append(null)
        return sizes, addresses

    def _slot(self, spot: Spot) -> int:
        """The address of the slot that holds where a spot lies."""
        slot = self._slots.setdefault(spot, len(self._slots))
        return ctypes.addressof(self._table) + slot * ctypes.sizeof(ctypes.c_uint64)


def _why_not(metadata: Any) -> str | None:
    """What a kernel asks of its launch that a submission does not give, or None."""
    asks = {
        "clusters": metadata.num_ctas != 1,
        "scratch memory": metadata.global_scratch_size > 0 or metadata.profile_scratch_size > 0,
        "a cooperative grid": metadata.launch_cooperative_grid,
        "a dependent launch": metadata.launch_pdl,
    }
    return next((f"the kernel needs {what}" for what, asked in asks.items() if asked), None)
