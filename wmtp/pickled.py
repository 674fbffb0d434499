"""Files of torch's own format, written so that a failing disk is an OSError."""

from pathlib import Path
from typing import Any

import torch


def save(value: Any, path: Path) -> None:
    """torch.save; what failed in writing is an OSError with the path, where torch says that a position was unexpected."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
