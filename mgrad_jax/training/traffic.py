"""What a compiled program sends between devices, read from its text: collectives and bytes, of its loops apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# How much of a result's bytes each of n devices sends, in a ring.
_SHARES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,  # its result is one n-th of what it adds up
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda _: 1.0,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*\bbody=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Collectives, how often each is called, and the bytes that each device sends in them, by ring algorithms."""

    collectives: int
    sent: float

    def times(self, n: int) -> Traffic:
        """The same so many times over."""
        return Traffic(n * self.collectives, n * self.sent)

    def shared_by(self, n: int) -> Traffic:
        """Of one of so many parts."""
        return Traffic(self.collectives // n, self.sent / n)

    def and_also(self, other: Traffic) -> Traffic:
        """Both."""
        return Traffic(self.collectives + other.collectives, self.sent + other.sent)

    def without(self, other: Traffic) -> Traffic:
        """What is left of it."""
        return Traffic(self.collectives - other.collectives, self.sent - other.sent)


NOTHING = Traffic(0, 0.0)


class ProgramText:
    """A compiled program for so many devices, of its text (`jax.stages.Compiled.as_text()`)."""

    def __init__(self, text: str, n_devices: int) -> None:
        self._n_devices = n_devices
        self._computations: dict[str, list[str]] = {}
        self._entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                lines = self._computations[head[2]] = []
                self._entry = head[2] if head[1] else self._entry
            else:
                lines.append(line)
        self._known: dict[str, Traffic] = {}

    def traffic(self) -> Traffic:
        """Of the whole program, its loops as often as they run."""
        return self._of(self._entry)

    def of_loop(self, trips: int) -> Traffic:
        """Of one turn of the loop that runs so often; of the one that sends most, where there are several."""
        loops = (found for line in self._lines() if (found := _LOOP.search(line)) and _trips(line) == trips)
        return max((self._of(loop[1]) for loop in loops), key=lambda traffic: traffic.sent, default=NOTHING)

    def largest_array(self) -> int:
        """Numbers of the largest array that an instruction makes; tuples, and what they are made of, are left out."""
        shapes = (found[1] for line in self._lines() if (found := _INSTRUCTION.match(line)))
        return max(math.prod(shape) for text in shapes if not text.startswith("(") for _, shape in _arrays(text))

    def _lines(self) -> Iterator[str]:
        for lines in self._computations.values():
            yield from lines

    def _of(self, computation: str) -> Traffic:
        if computation not in self._known:
            total = NOTHING
            for line in self._computations.get(computation, ()):
                total = total.and_also(self._of_line(line))
            self._known[computation] = total
        return self._known[computation]

    def _of_line(self, line: str) -> Traffic:
        if (found := _INSTRUCTION.match(line)) is None:
            return NOTHING
        result, operation = found.groups()
        name, started = operation.removesuffix("-start"), operation.endswith("-start")
        if name in _SHARES:
            return Traffic(1, self._sent(name, result, line, started))
        total = NOTHING
        for called in _CALLED.findall(line):
            total = total.and_also(self._of(called))
        if branches := _BRANCHES.search(line):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            total = total.and_also(max((self._of(name) for name in names), key=lambda traffic: traffic.sent))
        return total.times(_trips(line)) if operation == "while" else total

    def _sent(self, name: str, result: str, line: str, started: bool) -> float:
        n = _group_size(line) or self._n_devices
        size = float(sum(math.prod(shape) * _number_bytes(kind) for kind, shape in _arrays(result)))
        if started and name == "all-gather":  # its result is a pair of what it is given and of what comes of it
            size *= n / (n + 1)
        if started and name == "collective-permute":
            size /= 2
        return size * _SHARES[name](n)


def _trips(line: str) -> int:
    found = _TRIPS.search(line)
    return int(found[1]) if found else 1


def _arrays(text: str) -> Iterator[tuple[str, list[int]]]:
    for kind, shape in _ARRAY.findall(text):
        yield kind, [int(size) for size in shape.split(",") if size]


def _number_bytes(kind: str) -> int:
    """Of one number of a type such as f32, bf16, c64 or pred."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


def _group_size(line: str) -> int | None:
    """Devices of one group of a collective; None where all are in one."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return None
