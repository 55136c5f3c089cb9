"""The lines of a GPU check as Markdown, for RESULTS.md."""

from collections.abc import Iterator
from datetime import date

MARKED_DEVIATION = 0.1  # of a peak from the traced one
SHOWN_KERNELS = 15
ELSEWHERE = ("case", "took_s", "failure", "versions", "machine", "profile_ms")  # what the tables show in another place


def describe_machine(probe: dict, command: str) -> list[str]:
    """Command, card and versions of a run, and what the machine can do."""
    packages = ", ".join(f"{name} {version}" for name, version in probe.get("versions", {}).items() if version)
    card = "no GPU"
    if "gpu" in probe:
        card = f"{probe['gpu']} ({probe['memory_gib']} GiB, capability {probe['capability']}, driver {probe['driver']})"
    lines = [f"## GPU check, {date.today().isoformat()}", "", f"`{command}`; {card}; {packages}."]
    if "matmul_tflops" in probe:
        rates = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in probe["matmul_tflops"].items())
        lines.append(f"Matrix products: {rates}; copy: {probe['copy_gb_per_s']:.3g} GB/s (read + write).")
    if "to_host_gb_per_s" in probe:
        lines.append(f"Link: {probe['to_host_gb_per_s']} GB/s to the host, {probe['from_host_gb_per_s']} GB/s from it.")
    lines += [f"Missing here: {', '.join(probe['stand_ins'])}."] if probe.get("stand_ins") else []
    return lines


def deviation(row: dict, traced: dict) -> str:
    """How far a peak is from the traced one, in bold beyond :data:`MARKED_DEVIATION`."""
    share = row["peak_allocated_gib"] / traced["peak_gib"] - 1
    return f"**{share:+.1%}**" if abs(share) > MARKED_DEVIATION else f"{share:+.1%}"


def speed_table(rows: list[dict], rates: dict[str, float], traced: dict[str, dict]) -> list[str]:
    """A line for each case with a speed: memory, the traced peak, and the share of the measured matrix product.

    Args:
        rates: TFLOP/s of a matrix product by type.
        traced: ``peak_gib`` and ``compute_type`` by case.
    """
    lines = [
        "| case | tokens/s | s a step | TFLOP/s | of the matmul rate | peak allocated, GiB | reserved, GiB | traced, GiB "
        "| deviation | |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        if "tokens_per_s" not in row:
            continue
        rate = rates.get(row["compute_type"])
        cells = [row["case"], row["tokens_per_s"], f"{min(row['step_s']):.3g}", f"{row['tflops']:.3g}"]
        cells += [f"{row['tflops'] / rate:.0%}" if rate else "", f"{row['peak_allocated_gib']:.2f}"]
        cells.append(f"{row['peak_reserved_gib']:.2f}" if "peak_reserved_gib" in row else "")
        expected = traced.get(row["case"], {})
        is_comparable = expected.get("compute_type") == row["compute_type"]
        cells += [f"{expected['peak_gib']:.2f}", deviation(row, expected)] if is_comparable else ["", ""]
        lines.append(f"| {' | '.join(map(str, [*cells, row.get('failure', '')]))} |")
    return lines if len(lines) > 2 else []


def flattened(found: dict, prefix: str = "") -> Iterator[str]:
    """``key value`` of each value, those of dictionaries inside with both keys."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key} {value}"


def finding_table(rows: list[dict]) -> list[str]:
    """A line for each case without a speed: what it found, or why there is nothing."""
    lines = ["| case | s | | found |", "|:--|--:|:--|:--|"]
    for row in rows:
        if "tokens_per_s" not in row:
            found = "; ".join(flattened({key: value for key, value in row.items() if key not in ELSEWHERE}))
            cells = [row["case"], row.get("took_s", ""), row.get("failure", "passed"), found]
            lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return lines if len(lines) > 2 else []


def kernel_table(rows: list[dict]) -> list[str]:
    """The kernels that take longest in a step that was profiled."""
    for row in rows:
        if "profile_ms" in row:
            kernels = [[name.replace("|", "/"), *numbers] for name, numbers in row["profile_ms"].items()]
            lines = [f"| {row['case']}: kernel | ms | calls |", "|:--|--:|--:|"]
            return lines + [f"| {' | '.join(map(str, cells))} |" for cells in kernels[:SHOWN_KERNELS]]
    return []


def report_markdown(rows: list[dict], traced: dict[str, dict], command: str) -> str:
    """All tables of a check, of one that was cut off as far as it came.

    Args:
        rows: lines of the cases.
        traced: see :func:`speed_table`.
        command: that was run.
    """
    probe = next((row for row in rows if row["case"] == "probe"), {})
    tables = [
        describe_machine(probe, command),
        speed_table(rows, probe.get("matmul_tflops", {}), traced),
        finding_table(rows),
        kernel_table(rows),
    ]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)
