"""Prompts from Hugging Face `datasets` (`pip install rollahead[datasets]`): on the hub or in a folder.

Only naming a dataset of the hub downloads anything. Columns travel to the reward as TRL's do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.types import TaskSection
from pipeline.errors import UsageError
from pipeline.tasks.base import Example
from pipeline.tasks.jsonl import Chat, example, template_fields


class DatasetsTask:
    """`task.path` names the dataset, `task.subset` its configuration, `task.split` and `held_out_split` its parts."""

    def __init__(self, section: TaskSection, chat: Chat | None = None) -> None:
        """
        Raises:
            UsageError: the package is missing, the dataset cannot be loaded, or a row lacks what the task needs.
        """
        self.train: Sequence[Example] = _Rows(section, section.split, chat)
        self.held_out: Sequence[Example] = (
            _Rows(section, section.held_out_split, chat) if section.held_out_split else []
        )

    @property
    def longest_prompt(self) -> None:
        return None


class _Rows(Sequence[Example]):
    """Rows of a split, read when they are asked for: the data stay on disk."""

    def __init__(self, section: TaskSection, split: str, chat: Chat | None) -> None:
        self._rows, self._section, self._chat = _load(section, split), section, chat
        self._fields, self._name = template_fields(section.prompt_template), f"{section.path}[{split}]"
        if not len(self._rows):
            raise UsageError(f"dataset {self._name} is empty; set task.split to another one")
        self[0]  # refuse wrong columns before anything starts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = {key: value for key, value in self._rows[index].items() if value is not None}
        return example(row, f"{self._name}:{index}", self._fields, self._section, self._chat)


def _load(section: TaskSection, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            'task.kind = "datasets" needs the package datasets; pip install "rollahead[datasets]"'
        ) from error
    folder = Path(section.path)
    try:
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(section.path)[split]
        if (folder / "state.json").exists():
            return datasets.load_from_disk(section.path)
        return datasets.load_dataset(section.path, section.subset or None, split=split)
    except Exception as error:  # of the network, the hub, or a file: whatever the package raises
        raise UsageError(
            f"task.path = {section.path!r}, split {split!r}, cannot be loaded ({type(error).__name__}: {error}); "
            "give a name on the hub, a folder of save_to_disk, or a folder of files, and a split that it has"
        ) from error
