"""Site files: groups, patterns and preferences as their standards have them, and hostile ones in no time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protego import Protego

from stages.robots import SiteRules, matches, normalised, product_token, read_site_file

AGENT = "densebridge"


def rules(text: str, name: str = "robots.txt") -> SiteRules:
    made = SiteRules()
    read_site_file(name, text, AGENT, made)
    return made


def says(text: str, path: str, name: str = "robots.txt") -> set[str]:
    return rules(text, name).directives(path)


GROUPS = """\ufeff# a comment
User-agent: otherbot
Disallow: /other

USER-AGENT : *   # everyone
Disallow: /all

User-agent: DenseBridge/0.1
Sitemap: https://pictures.example/map.xml
User-agent: thirdbot
Disallow: /ours
Crawl-delay: 1.5

User-agent: densebridge
Allow: /ours/open
Crawl-delay: soon
"""


def test_our_groups_count_and_only_without_them_everyones() -> None:
    assert says(GROUPS, "/ours/x") == {"robots-disallow"}
    assert says(GROUPS, "/ours/open/x") == says(GROUPS, "/all") == says(GROUPS, "/other") == set()
    assert rules(GROUPS).crawl_delay == 1.5
    assert says(GROUPS.replace("DenseBridge", "x").replace("densebridge", "y"), "/all/x") == {"robots-disallow"}
    assert says("User-agent: dense\nUser-agent: densebridge2\nDisallow: /", "/") == set()  # names are whole names
    assert says("User-agent: densebridge\nUser-agent: *\nDisallow:\n", "/") == set()
    assert says("User-agent: densebridge\n\nUser-agent: *\nDisallow: /", "/") == {"robots-disallow"}  # one group


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("/", "/anything?at=all", True),
        ("/fish", "/fish.html", True),
        ("/fish", "/Fish", False),
        ("/fish/", "/fish", False),
        ("/*.gif$", "/a/b.gif", True),
        ("/*.gif$", "/a/b.gif?x", False),
        ("/a*b*c", "/a-b-b-c-d", True),
        ("/a*b*c", "/a-c-b", False),
        ("/a*a$", "/a", False),
        ("/$", "/", True),
        ("/$", "/a", False),
        ("*", "", True),
        ("$", "/", False),
        ("/a$b", "/a$b", True),
        ("/foo/bar/\u30c4", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        ("/a%2fb", "/a%2Fb", True),
        ("/a/b", "/a%2Fb", False),
    ],
)
def test_patterns(pattern: str, path: str, matched: bool) -> None:
    assert matches(normalised(pattern), normalised(path)) is matched


def test_the_longest_pattern_decides_and_allow_wins_a_draw() -> None:
    text = "User-agent: *\nDisallow: /\nAllow: /p\nDisallow: /p*.htm\nAllow: /same\nDisallow: /same"
    assert says(text, "/page") == set() and says(text, "/same") == set()
    assert says(text, "/page.htm") == says(text, "/x") == {"robots-disallow"}


PATHS = st.text(alphabet="/ab.", max_size=6).map(lambda text: "/" + text)
PATTERNS = st.text(alphabet="/ab.*", max_size=6).map(lambda text: "/" + text) | PATHS.map(lambda text: text + "$")


@given(st.lists(st.tuples(st.sampled_from(["Allow", "Disallow"]), PATTERNS), max_size=6), PATHS)
def test_rules_as_another_parser_reads_them(lines: list[tuple[str, str]], path: str) -> None:
    text = "User-agent: *\n" + "\n".join(f"{key}: {pattern}" for key, pattern in lines)
    allowed = Protego.parse(text).can_fetch(f"http://pictures.example{path}", AGENT)
    assert (says(text, path) == set()) is allowed


@given(st.text(), st.sampled_from(["robots.txt", "ai.txt", "tdmrep.json"]), PATHS)
def test_any_text_is_read(text: str, name: str, path: str) -> None:
    assert says(text, path, name) <= {
        "robots-disallow",
        "ai-txt-disallow",
        "ai-train=no",
        "train-ai=n",
        "tdm-reservation",
    }


def test_a_pattern_takes_no_longer_than_its_length() -> None:
    """By regular expressions this takes hours."""
    assert says("User-agent: *\nDisallow: /" + "*a" * 200 + "*b$", "/" + "a" * 5000) == set()


def test_many_names_for_many_rules_cost_no_more_than_their_lines() -> None:
    text = "".join(f"User-agent: bot{n}\n" for n in range(15_000)) + "Disallow: /\n" * 15_000
    assert says(text, "/") == set()
    assert says(text + "User-agent: *\n" + "Disallow: /a\n" * 15_000, "/a") == {"robots-disallow"}


def test_preferences_stand_in_the_same_groups() -> None:
    text = "User-agent: *\nContent-Signal: search=yes, ai-train=no\nAllow: /\nUser-agent: otherbot\nDisallow: /"
    assert says(text, "/a.jpg") == {"ai-train=no"}
    assert says("Content-Signal: ai-train=no", "/") == {"ai-train=no"}  # before any name: for everyone
    assert says("Content-Signal: ai-train=yes", "/") == says("Content-Signal: search=no", "/") == set()
    draft = "User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /open/ train-ai=y"
    assert says(draft, "/a") == {"train-ai=n"} and says(draft, "/open/a") == set()


def test_ai_txt_names_kinds_of_files() -> None:
    text = "User-Agent: *\nDisallow: *.jpg\nAllow: *.txt"
    assert says(text, "/a/b.jpg", "ai.txt") == {"ai-txt-disallow"} and says(text, "/a.txt", "ai.txt") == set()


def test_tdmrep_takes_the_first_that_matches() -> None:
    entries = [
        {"location": "/open/", "tdm-reservation": 0},
        {"location": "/*.jpg", "tdm-reservation": 1, "tdm-policy": "https://pictures.example/policy.json"},
    ]
    text = json.dumps([*entries, 3, {"location": 4}])
    assert says(text, "/a.jpg", "tdmrep.json") == {"tdm-reservation"}
    assert says(text, "/open/a.jpg", "tdmrep.json") == says(text, "/a.png", "tdmrep.json") == set()
    assert says("[" * 100_000, "/", "tdmrep.json") == says("{}", "/", "tdmrep.json") == set()


@pytest.mark.parametrize("value", ["nan", "inf", "-3", "", "1e999", "x"])
def test_a_delay_that_is_none(value: str) -> None:
    assert rules(f"User-agent: *\nCrawl-delay: {value}").crawl_delay == 0


@pytest.mark.parametrize(
    ("agent", "token"),
    [("densebridge/0.1 (+me@example.org)", "densebridge"), ("My_Bot-2 x", "my_bot-2"), ("(x)", ""), ("", "")],
)
def test_the_name_that_rules_address(agent: str, token: str) -> None:
    assert product_token(agent) == token
