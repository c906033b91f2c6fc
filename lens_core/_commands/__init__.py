"""The subcommands of `lens`, one module each, imported when the command is called.

Each has `add_arguments(parser)` and `run(arguments) -> int`, the exit code.
"""
