"""Public functions that check their own arguments."""

from typing import TYPE_CHECKING, TypeVar, no_type_check

__all__ = ["checks_arguments"]

F = TypeVar("F")

if TYPE_CHECKING:

    def checks_arguments(function: F) -> F:
        """Mark a public function that answers wrong arguments by `ArgumentError`."""
        return function

else:
    # The tests' run-time type checks would answer first, by an error that users never see.
    checks_arguments = no_type_check
