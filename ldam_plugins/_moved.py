"""Old import paths: those that the README named, and those that saved models need."""

import warnings


def warn_moved(old: str, new: str) -> None:
    """Warn the code that imports the module ``old`` of where its names are now."""
    warnings.warn(f"`{old}` has moved to `{new}`.", DeprecationWarning, stacklevel=3)
