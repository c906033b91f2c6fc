"""All subjects of the family law suite. A family adds its module here."""

import importlib.util

from families import gpt2, llama, mamba
from families.subject import Subject

ALL: list[Subject] = [*gpt2.SUBJECTS, *llama.SUBJECTS, *mamba.SUBJECTS]

BY_NAME = {subject.name: subject for subject in ALL}
SUBJECTS = [subject for subject in ALL if importlib.util.find_spec(subject.plugin) is not None]
