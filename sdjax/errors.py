"""The errors a user can meet, each with the exit code its command ends with."""


class SdjaxError(Exception):
    """Base of every error this library raises on purpose; its message is one or two lines."""

    exit_code = 1


class ConfigError(SdjaxError, ValueError):
    """A setting, a flag or an argument is wrong."""

    exit_code = 2


class DataError(SdjaxError, ValueError):
    """An image, a caption, a weight file or a checkpoint is wrong or missing."""

    exit_code = 3


class TrainingStopped(SdjaxError, RuntimeError):
    """Training stopped itself: a loss that is not a number, or no memory left."""

    exit_code = 4
