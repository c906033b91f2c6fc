"""All subjects of the family law suite. A family adds its module here."""

import importlib.util
import os

from families import gpt2, llama, mamba
from families.subject import Subject

ALL: list[Subject] = [*gpt2.SUBJECTS, *llama.SUBJECTS, *mamba.SUBJECTS]

BY_NAME = {subject.name: subject for subject in ALL}
# The kit holds their kin to the same laws, so the first type of each family is enough; LENS_EVERY_SUBJECT=1 runs all.
IS_EVERY = bool(os.environ.get("LENS_EVERY_SUBJECT"))
SUBJECTS = [one for one in ALL if (one.full or IS_EVERY) and importlib.util.find_spec(one.plugin) is not None]
