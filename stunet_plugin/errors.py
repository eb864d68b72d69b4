"""The one error type that users are meant to read."""


class PluginError(ValueError):
    """Wrong input from a user: the message says what was given, what is allowed and what to do next.

    The command line prints it without a traceback and exits with 2; inside a stock ``nnUNetv2_*`` command it is the
    last line of the traceback.
    """
