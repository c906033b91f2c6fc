"""Public functions that check their own arguments."""

from typing import TYPE_CHECKING, TypeGuard, TypeVar, no_type_check

__all__ = ["checks_arguments", "is_whole"]

F = TypeVar("F")

if TYPE_CHECKING:

    def checks_arguments(function: F) -> F:
        """Mark a public function that answers wrong arguments by `ArgumentError`."""
        return function

else:
    # The tests' run-time type checks would answer first, by an error that users never see.
    checks_arguments = no_type_check


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number of at least so much; True and False are none.

    Example:
        >>> is_whole(3), is_whole(0), is_whole(0, least=0), is_whole(True), is_whole(2.0)
        (True, False, True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
