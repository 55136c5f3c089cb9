"""The files that the report of an experiment is made from."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas


@dataclass(frozen=True)
class Sources:
    """What the report is made from.

    Attributes:
        results: folder of the experiment.
        files: paths of the records, tables (Markdown, CSV) and plots (SVG) to show, all of them in this folder.
        experiment: the completed configuration, as JSON has it.
        base: label of the row that is the base model as it is; None if there is none.
        jobs: wildcards of the experiment's jobs; measured times of other jobs are left out.
        checkout: commit of the code that makes the report, if known.
        versions: of the software that makes the report.
    """

    results: Path
    files: list[str]
    experiment: dict
    base: str | None = None
    jobs: frozenset[str] = frozenset()
    checkout: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """A file, by its path in the folder of the experiment; None if it is not one of the files to show."""
        path = self.results / name
        return path if str(path) in self.files else None

    def text(self, name: str) -> str | None:
        """The content of a file; None if it is not one of the files to show."""
        path = self.find(name)
        return path.read_text(encoding="utf-8") if path else None

    def record(self, name: str) -> Any:
        """The content of a JSON file; None if it is not one of the files to show."""
        text = self.text(name)
        return None if text is None else json.loads(text)

    def records(self, folder: str) -> dict[str, dict]:
        """The JSON records in a folder, by the labels of their systems."""
        found = {self.experiment["systems"][name]["label"]: self.record(f"{folder}/{name}.json") for name in self.systems}
        return {label: record for label, record in found.items() if record is not None}

    @property
    def systems(self) -> list[str]:
        """Names of the systems that the configuration lists."""
        return self.experiment["listed"]

    def frame(self, name: str) -> pandas.DataFrame:
        """The content of a CSV file; only empty fields are missing values, since a system may have the name ``none``."""
        texts = dict.fromkeys(("label", "dataset_label", "system", "other"), str)
        return pandas.read_csv(self.results / name, keep_default_na=False, na_values=[""], dtype=texts)
