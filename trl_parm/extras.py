# SPDX-License-Identifier: Apache-2.0
"""Packages that come with an extra: what needs one says so before it begins, and nothing else needs it."""

import importlib.util


def require(extra: str, who: str, *packages: str) -> None:
    """Raises `ImportError` unless these packages are installed.

    Args:
        extra (`str`): The extra of `trl-parm` that has them.
        who (`str`): What needs them, as the message begins.
        *packages (`str`): What they are imported as.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{who} needs {', '.join(missing)}: pip install 'trl-parm[{extra}]'")
