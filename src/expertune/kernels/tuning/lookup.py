"""The configuration of a launch: what was tuned on this card, or else the shipped table. Nothing is tuned here.

Launchers ask at each launch, so an answer is kept: a repeated question is one look into a dictionary. The first
question of a process reads the cache on disk.
"""

from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from expertune.kernels.device import architecture, card_name
from expertune.kernels.tuning.cache import CacheFile, Entries, default_folder
from expertune.kernels.tuning.configs import Config, Shape, why_not
from expertune.kernels.tuning.tables import OPERATIONS, Operation, shipped

_KERNELS = Path(__file__).parents[1]


class Key(NamedTuple):
    """What a configuration is chosen for.

    Args:
        shape: the kernel's widths, rank and layout.
        device: where it runs.
        dtype: of its operands.
        bucket: rows an expert on average, rounded up to a power of two from 32 to 2048; 2048 stands for all above.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    bucket: int

    @property
    def operation(self) -> Operation:
        """The kernel."""
        return OPERATIONS[type(self.shape)]

    def text(self) -> str:
        """The key of the cache: also of the kernel's source, so that a changed kernel is tuned anew."""
        shape = " ".join(f"{name}={int(value)}" for name, value in asdict(self.shape).items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{_source(self.operation)}{dtype} {shape} rows={self.bucket}"


class TunedConfigs:
    """The configurations of a process.

    Args:
        folder: of the cache; None takes the default folder when it is first needed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[tuple[Any, ...], Config] = {}
        self._entries: dict[torch.device, Entries] = {}
        self._complaints: dict[torch.device, list[str]] = {}

    def config(self, shape: Shape, device: torch.device, dtype: torch.dtype, num_rows: int, num_experts: int) -> Any:
        """The configuration of the shape's own class, in less than a microsecond when it was asked for before.

        Args:
            shape: the kernel's widths, rank and layout.
            device: where it runs.
            dtype: of its operands.
            num_rows: `N`, at least 1.
            num_experts: `E`.
        """
        bucket = 1 << min(max(((num_rows - 1) // num_experts).bit_length(), 5), 11)
        asked = (shape, device, dtype, bucket)
        return self._known.get(asked) or self._find(Key(*asked))

    def answers(self) -> dict[Key, Config]:
        """Everything that was asked for, in order."""
        return {Key(*asked): config for asked, config in self._known.items()}

    def forget(self) -> None:
        """Begin as a new process does."""
        self._known.clear()
        self._entries.clear()
        self._complaints.clear()

    def file(self, device: torch.device) -> CacheFile:
        """The cache of a device.

        Raises:
            RuntimeError: no folder for it is known.
        """
        return CacheFile(folder=self._folder or default_folder(), card=card_name(device), triton=triton.__version__)

    def keep(self, key: Key, config: Config) -> None:
        """Write a tuned configuration to the cache, where the next process finds it.

        Raises:
            OSError: it cannot be written.
        """
        self.file(key.device).add({key.text(): asdict(config)})

    def status(self, device: torch.device) -> str:
        """In words, for a report: how many configurations were tuned, and what of the cache cannot be used."""
        entries = self._read(device)
        if complaints := self._complaints[device]:
            return "; ".join(complaints) + ". The shipped configuration is used instead; `expertune tune` writes anew"
        if num_tuned := sum(text.startswith(tuple(map(_source, OPERATIONS.values()))) for text in entries):
            return f"tuned configurations: {num_tuned}, from {self.file(device).path}"
        return "shipped configurations; `expertune tune` measures others on this card"

    def _find(self, key: Key) -> Config:
        card, itemsize = architecture(key.device), key.dtype.itemsize
        text = key.text()
        entries = self._read(key.device)
        if text in entries:
            config = _parsed(entries[text], key.operation)
            reason = "it is damaged" if config is None else why_not(config, key.shape, card, itemsize)
            if config is not None and reason is None:
                return self._known.setdefault(key, config)
            self._complaints[key.device].append(f"the tuned configuration of {text!r} cannot be used: {reason}")
        return self._known.setdefault(key, shipped(key.shape, card, itemsize, key.bucket))

    def _read(self, device: torch.device) -> Entries:
        """The entries of a device; from disk once a process."""
        if device not in self._entries:
            try:
                file = self.file(device)
            except RuntimeError as error:  # no home folder
                self._entries[device] = {}
                self._complaints[device] = [f"tuned configurations cannot be looked for: {error}"]
            else:
                self._entries[device], reason = file.read()
                complaint = f"tuned configurations in {file.path} cannot be used: {reason}"
                self._complaints[device] = [] if reason is None else [complaint]
        return self._entries[device]


TUNED = TunedConfigs()


def _source(operation: Operation) -> str:
    """A kernel by its name and its source text."""
    text = (_KERNELS / f"{operation.kernel}.py").read_bytes()
    return f"{operation.kernel}@{sha256(text).hexdigest()[:16]} "


def _parsed(entry: Any, operation: Operation) -> Config | None:
    """The configuration of an entry, or None where it is damaged."""
    names = {field.name for field in fields(operation.config)}
    if not isinstance(entry, dict) or set(entry) != names or any(type(value) is not int for value in entry.values()):
        return None
    return operation.config(**entry)
