"""The public API is what the committed list says."""

from __future__ import annotations

import public_api


def test_the_public_api_is_as_listed() -> None:
    listed, found = public_api.LISTED.read_text().splitlines(), public_api.lines()
    gone, new = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
    assert (gone, new) == ([], []), (
        "The public API changed. If that is meant: python tests/public_api.py, and commit the list. "
        f"Gone: {gone}. New: {new}."
    )
