"""Packages that a file of tests needs in the processes that it starts."""

from __future__ import annotations

import importlib.util

import pytest


def needs(*packages: str) -> None:
    """Skip the file where one is missing; looked up: `importorskip` imports it in every process that collects tests."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}", allow_module_level=True)
