"""The errors that a user can meet, with the exit code of a command for each."""


class SdjaxError(Exception):
    """The base class of all errors that sdjax raises on purpose. A message has one or two lines."""

    exit_code = 1


class ConfigError(SdjaxError, ValueError):
    """A setting, a flag or an argument is wrong."""

    exit_code = 2


class DataError(SdjaxError, ValueError):
    """An image, a caption, a weight file or a checkpoint is wrong or missing, or cannot be written."""

    exit_code = 3


class TrainingStopped(SdjaxError, RuntimeError):
    """Training or drawing stopped itself: the loss is not a number, or no memory is left."""

    exit_code = 4
