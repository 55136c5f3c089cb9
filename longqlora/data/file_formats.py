"""The formats of data files, as their names tell them.

Imports nothing heavy: names are checked when the configuration is read.
"""

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = (".jsonl", ".json", ".parquet", ".txt")


def file_format(path: str) -> str:
    """Format of a file, from the ending of its name without the compression.

    Raises:
        ValueError: if the name has no known ending.
    """
    name = path
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise ValueError(f"{path}: unknown format; known are {', '.join(FORMATS)}, compressed or not ({', '.join(COMPRESSIONS)})")
