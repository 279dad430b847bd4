"""What all tests share: one process with everything imported, from which jobs of several ranks are forked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("jobs"))
    yield zygote
    zygote.close()
