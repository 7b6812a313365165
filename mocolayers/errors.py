"""Errors a person can do something about; every message names what is wrong and what to type next."""


class DatasetError(Exception):
    """A prepared data set is missing, damaged or unfit for what was asked."""


class RunError(Exception):
    """A run's folder cannot be used, or a training cannot go on."""
