"""Let the libraries of llama-cpp-py-sync load with a glibc below 2.38, such as that of Debian 12, for the tests.

    python .ci/llama_cpp_on_old_glibc.py

All that they need of glibc 2.38 is C23's variants of strtol and the like, which also read binary numbers (0b1). In the dynamic
symbols, each is renamed to the function of the same name without the prefix, and the version is marked as one that may be
missing. ELF's structures: elf(5).
"""

import struct
from importlib.util import find_spec
from pathlib import Path

PREFIX, VERSION = b"__isoc23_", b"GLIBC_2.38\0"
DYNAMIC_SYMBOLS, SYMBOL_VERSIONS, NEEDED_VERSIONS = 11, 0x6FFFFFFF, 0x6FFFFFFE  # sh_type
WEAK, ANY_VERSION = 2, 1


def sections(data: bytes) -> list[tuple[int, int, int, int]]:
    """Type, offset, size and linked section of each section of a 64-bit file."""
    (offset,), (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + number * size) for number in range(count)]
    return [(header[1], header[4], header[5], header[6]) for header in headers]


def make_version_optional(data: bytearray, start: int, strings: int) -> None:
    """Mark :data:`VERSION` as one that may be missing, in all libraries from which versions are needed."""
    following = start
    while following:
        start, (_, count, _, first, step) = following, struct.unpack_from("<HHIII", data, following)
        entry = start + first
        for _ in range(count):
            name, next_entry = struct.unpack_from("<II", data, entry + 8)
            if data.startswith(VERSION, strings + name):
                struct.pack_into("<H", data, entry + 4, WEAK)
            entry += next_entry
        following = start + step if step else 0


def rename_symbols(data: bytearray, start: int, size: int, strings: int, versions: int) -> None:
    """Take the prefix off the names of symbols, which end in the same place."""
    for number in range(size // 24):
        (name,) = struct.unpack_from("<I", data, start + 24 * number)
        if data.startswith(PREFIX, strings + name):
            struct.pack_into("<I", data, start + 24 * number, name + len(PREFIX))
            struct.pack_into("<H", data, versions + 2 * number, ANY_VERSION)


def adapt(library: Path) -> None:
    """Change a library in place."""
    data = bytearray(library.read_bytes())
    found = sections(data)
    versions = next(start for kind, start, _, _ in found if kind == SYMBOL_VERSIONS)
    for kind, start, size, link in found:
        if kind == NEEDED_VERSIONS:
            make_version_optional(data, start, strings=found[link][1])
        elif kind == DYNAMIC_SYMBOLS:
            rename_symbols(data, start, size, strings=found[link][1], versions=versions)
    library.write_bytes(data)


for folder in find_spec("llama_cpp_py_sync").submodule_search_locations:
    for path in Path(folder).glob("*.so*"):
        adapt(path)
