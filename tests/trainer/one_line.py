"""What a user's mistake says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from data_shards.errors import UserError


def message(call: Callable[[], Any]) -> str:
    """The one line of a user's mistake."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text
