"""The one exception that users see: a single line that names the fix. Imports nothing."""


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with code 2."""


class RunFailed(RuntimeError):
    """A run that started and did not succeed. The command line prints the message as one line and exits with code 1."""
