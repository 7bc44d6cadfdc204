"""The frame of the fuzzers: damages files by a seed, reads each, and counts what came of it.

A fuzzer (`tests/*/fuzz_*.py`) has three things of its own, and its last line hands them over:

    fuzzing.main(__doc__, samples, mutate, read)

`samples()` gives whole files, name (with the ending) to bytes. `mutate(name, data, random)` gives a
damaged one; `damaged` here is a mutation of plain bytes to build on. `read(path)` reads a file to
its end and says `"read"`, or in a word or two how it was refused. Whatever `read` raises counts as
"other", and so does a file that takes more CPU seconds or memory than it may: the session goes on,
the file is kept, and the process ends with 1. A crash ends the session; the file is the newest.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import faulthandler
import pathlib
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

Mutate = Callable[[str, bytes, random.Random], bytes]


def memory_of_readers(size: int) -> float:
    """What a file of that many bytes may take while it is read: 1.2 times its size and 100 MB."""
    return 1.2 * size + 100e6


@dataclasses.dataclass
class Session:
    """What became of the damaged files."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    slowest: tuple[float, str] = (0.0, "")  # CPU seconds of one file, and which
    largest: tuple[float, str] = (0.0, "")  # bytes that one file took beyond those before it
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"  {word:<20} {n:>9,}" for word, n in self.outcomes.most_common()]
        if "other" not in self.outcomes:
            rows.append(f"  {'other':<20} {0:>9,}")
        (seconds, slow), (size, large) = self.slowest, self.largest
        rows.append(f"  slowest {seconds:.2f} CPU s ({slow}), most memory {size / 1e6:.0f} MB")
        rows[-1] += f" ({large})"
        return "\n".join([*rows, *(f"  FAILED {line}" for line in self.failures)])


def session(
    files: dict[str, bytes],
    mutate: Mutate,
    read: Callable[[pathlib.Path], str],
    folder: pathlib.Path,
    *,
    count: int,
    minutes: float = float("inf"),
    seed: int = 0,
    seconds: float = 5.0,
    memory: Callable[[int], float] = memory_of_readers,
    keep: Sequence[str] = (),
) -> Session:
    """Damages and reads files, the samples in turn, until `count` or `minutes` of CPU are spent.

    Args:
        files: The samples.
        mutate: Damages one.
        read: Reads one.
        folder: Where the damaged files lie, and those that fail stay.
        count: How many.
        minutes: Of CPU time, of this process.
        seed: With the number of the damage, what decides it.
        seconds: Of CPU that one file may take.
        memory: The bytes that a file of that size may take.
        keep: Outcomes whose files are kept as well.
    """
    out, names = Session(), sorted(files)
    end = time.process_time() + 60 * minutes
    for index in range(count):
        if time.process_time() > end:
            break
        name = names[index % len(names)]
        data = mutate(name, files[name], random.Random(f"{seed} {index}"))
        path = folder / f"damaged_{seed}_{name}"
        path.write_bytes(data)
        faulthandler.dump_traceback_later(20 * seconds, exit=True)
        before, start = _memory(reset=True), time.process_time()
        try:
            word, why = read(path), ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            word, why = "other", f"{type(error).__name__}: {error}"
        took, size = time.process_time() - start, _memory() - before
        faulthandler.cancel_dump_traceback_later()
        if took > seconds:
            word, why = "other", f"{took:.1f} CPU s"
        if size > memory(len(data)):
            word, why = "other", f"{size / 1e6:.0f} MB"
        out.outcomes[word] += 1
        out.slowest = max(out.slowest, (took, f"{name} #{index}"))
        out.largest = max(out.largest, (size, f"{name} #{index}"))
        if word == "other" or word in keep:
            kept = path.rename(folder / f"{word.replace(' ', '_')}_{seed}_{index}_{name}")
            if word == "other":
                out.failures.append(f"{kept}: {why}")
    return out


def _memory(reset: bool = False) -> int:
    """This process's peak in bytes since the last reset, or with `reset` what it has now.

    0 where the kernel does not tell.
    """
    mark = "VmHWM"
    try:
        if reset:
            mark = "VmRSS"
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{mark}:")[2].split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):
        return 0


# Where counts and sizes change their minds.
NUMBERS = (0, 1, -1, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1)
NUMBERS += (2**40, 2**62, -(2**63))


def damaged(
    data: bytes,
    random: random.Random,
    words: Sequence[bytes] = (b"\0",),
    ends: tuple[int, int] = (15_000, 900),
    times: Sequence[int] = (1, 1, 1, 2, 3, 6),
) -> bytes:
    """Random damages: bits, bytes, numbers, cuts, copies, insertions.

    Args:
        data: A whole file, or a part of one.
        random: Decides.
        words: What means something in such a file, an instruction or a marker, to be put in.
        ends: How much of the front and of the back is worth damaging most.
        times: How many damages, one of these.
    """
    out = bytearray(data)
    for _ in range(random.choice(times)):
        if not out:
            break
        front, back = ends
        spans = [(0, front // 25), (0, front), (len(out) - back, len(out)), (0, len(out))]
        first, last = random.choice(spans)
        first, last = max(0, first), max(1, min(len(out), last))
        at = random.randrange(min(first, last - 1), last)
        source, some = random.randrange(len(out)), random.randrange(1, 60)
        match random.randrange(10):
            case 0:
                out[at] ^= 1 << random.randrange(8)
            case 1:
                out[at] = random.randrange(256)
            case 2:
                word = random.choice(words)
                out[at : at + len(word)] = word
            case 3:
                form = random.choice(("<i", "<q", "<h", "b", ">i", ">q", ">h"))
                width = struct.calcsize(form)
                number = random.choice(NUMBERS) % 2 ** (8 * width)
                order = "big" if form[0] == ">" else "little"
                out[at : at + width] = number.to_bytes(width, order)
            case 4:
                del out[at:]
            case 5:
                del out[at : at + some]
            case 6:
                out[at:at] = out[source : source + 4 * some]
            case 7:
                out[at : at + some] = out[source : source + some]
            case 8:
                out[at:at] = b"".join(random.choice(words) for _ in range(random.randrange(1, 9)))
            case 9:
                digits = [i for i in range(first, min(last, first + 4096)) if 48 <= out[i] < 58]
                if digits:
                    out[random.choice(digits)] = random.choice(b"0123456789-")
    return bytes(out)


# What a value of a JSON text can become.
JSON_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 17, 4096, 60_000, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-320,
    1e308, float("nan"), float("inf"), "", "a", "\x1b[31m\n", "\ud800", "a" * 5_000, [], [[]], {},
    [None, None, None, 3], [60_000, 60_000], [1.5, "a"], {"a": 1}, {"class_name": "Dense"},
    "float16", "mixed_bfloat16", "valid", "same", "softmax", "channels_first", "__numpy__",
)  # fmt: skip


def change(text: dict | list, random: random.Random) -> None:
    """Changes one place of a description: every one is as likely, however deep."""
    places = []
    waiting = [text]
    while waiting:
        inside = waiting.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        places += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], (dict, list))]
    if not places:
        return
    inside, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del inside[key]
        case 1:
            inside[key] = copy.deepcopy(random.choice(places)[0])
        case 2:
            for _ in range(random.choice((1, 20, 200))):
                inside[key] = [inside[key]]
        case 3 if isinstance(inside[key], list):
            inside[key] = inside[key] * random.choice((0, 2, 50))
        case 4 if isinstance(inside[key], dict):
            inside[key][random.choice(("info", "config", "shape", "a"))] = random.choice(
                JSON_VALUES
            )
        case 5 if isinstance(inside[key], (int, float)):
            inside[key] = inside[key] * random.choice((-1, 2, 1_000, 10**9))
        case _:
            inside[key] = copy.deepcopy(random.choice(JSON_VALUES))


def main(
    about: str,
    samples: Callable[[], dict[str, bytes]],
    mutate: Mutate,
    read: Callable[[pathlib.Path], str],
    *,
    memory: Callable[[int], float] = memory_of_readers,
    seconds: float = 5.0,
    keep: Sequence[str] = (),
    others: dict[str, Callable[[pathlib.Path], str]] | None = None,
) -> None:
    """The command line of a fuzzer; the arguments are those of `session`.

    Args:
        about: The fuzzer's docstring.
        samples: Makes the files.
        mutate: Damages one.
        read: Reads one.
        memory: The bytes that a file of that size may take.
        seconds: Of CPU that one file may take, unless `--limit` says otherwise.
        keep: Outcomes whose files are kept as well.
        others: Other readers, by name, for `--read-with`.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--count", type=int, help="how many files (20,000 without --minutes)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of CPU time, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=seconds, help="CPU seconds for one file")
    if others:
        parser.add_argument("--read-with", choices=list(others), help="more than the reader does")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the files that fail")
    options = parser.parse_args()
    count = options.count or (20_000 if options.minutes == float("inf") else sys.maxsize)
    read = (others or {}).get(getattr(options, "read_with", None) or "", read)
    folder = options.keep or pathlib.Path(tempfile.mkdtemp(prefix="fuzz_"))
    folder.mkdir(parents=True, exist_ok=True)
    files = samples()
    start = time.process_time()
    result = session(
        *(files, mutate, read, folder),
        count=count,
        minutes=options.minutes,
        seed=options.seed,
        seconds=options.limit,
        memory=memory,
        keep=keep,
    )
    spent, total = time.process_time() - start, result.outcomes.total()
    print(f"{total:,} damaged files of {len(files)} kinds, seed {options.seed}, {spent:.0f} CPU s")
    print(f"{result}\n  files in {folder}")
    sys.exit(bool(result.failures))
