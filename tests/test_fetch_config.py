"""Settings of the fetch: the wrong ones are refused, and nobody asks the public without saying who it is."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from stages.fetch import fetch
from stages.fetch_config import MANNERS, FetchConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"per_host_rate": float("nan")},
        {"retries": -1},
        {"user_agent": "two\nlines"},
        {"user_agent": "(nobody)"},
        {"opt_out": "noai"},
        {"opt_out": ("NoAI",)},
        {"site_files": ("humans.txt",)},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"fetch: {next(iter(wrong))} must"):
        FetchConfig(**wrong)


@pytest.mark.parametrize(
    "agent", ["densebridge/0.1", "densebridge/0.1 (+set DENSEBRIDGE_CONTACT)", "bot (+https://)", "bot (+@)"]
)
def test_the_public_is_not_asked_without_a_contact(agent: str) -> None:
    with pytest.raises(ValueError, match="names no contact: add a page or an e-mail"):
        fetch(["http://example.org/a.jpg"], FetchConfig(user_agent=agent))
    assert fetch([], FetchConfig(user_agent=agent, allow_private_hosts=True)) == []


@pytest.mark.parametrize("agent", ["bot/1 (+https://a.org/bot)", "bot (me@a.org)", "bot http://a.org"])
def test_a_contact_is_a_page_or_an_address(agent: str) -> None:
    FetchConfig(user_agent=agent).check_contact()


def test_manners_are_settings() -> None:
    assert {field.name for field in fields(FetchConfig)} >= MANNERS
