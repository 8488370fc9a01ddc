"""`densebridge forget`: what it refuses, what it says, and that pages which show what goes go with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import build, forget
from jobs.cli import run
from jobs.forget import ForgetOptions, read_asked
from jobs.report import keys_shown
from pipeline import takedown
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.takedown_tables import Removed, Rewritten
from pipeline.tombstones import read_tombstones
from tests.small_stages import small_source, urls

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "tests/small_recipe.py")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built dataset of the small recipe, and the folder that `report` would be looked for in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMALL_FOLDER", str(tmp_path))
    monkeypatch.delenv("SMALL_BREAK", raising=False)
    monkeypatch.delenv("DENSEBRIDGE_TRACE", raising=False)
    small_source(tmp_path, urls(12))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert forget.main([RECIPE, *flags]) == 0
    return capsys.readouterr().out


def listed(folder: Path, *lines: str) -> str:
    path = folder / "list.txt"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("flag", "text", "complaint"),
    [
        ("--sha256", "# a note\n\nabc\n", r"--sha256 .*list.txt, line 3: 'abc' is no SHA-256"),
        (
            "--domains",
            "fine.example\nhttps://a.example/x\n",
            r"line 2: 'https://a.example/x' is no domain: write it as",
        ),
        ("--domains", "com\n", r"line 1: 'com' is no domain"),
        ("--domains", "exa/mple.org\n", r"line 1: 'exa/mple.org' is no domain"),
        ("--urls", "# note\nurl\nu://x000/0\n", r"--urls .*list.txt, line 2: 'url' is no URL: it has no scheme"),
        ("--urls", "# nothing but notes\n\n", r"--urls .*list.txt names nothing: write one a line"),
    ],
)
def test_a_wrong_line_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, text: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        forget.main([RECIPE, flag, listed(folder, text)])
    assert not (folder / "dataset").exists()


def test_a_missing_file_or_page_or_request_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = listed(folder, "u://x000/0")
    for flags, complaint in (
        (["--urls", "none.txt"], "--urls none.txt: there is no such file"),
        (["--urls", there, "--report", "nowhere"], "--report nowhere: there is no such page"),
        ([], "nothing to forget is named: give --urls FILE"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("forget", [RECIPE, *flags])
        said = capsys.readouterr().err
        assert ended.value.code == 1 and complaint in said and len(said.splitlines()) == 1
    (folder / "latin.txt").write_bytes("http://b\xfccher.de/\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        forget.main([RECIPE, "--urls", "latin.txt"])


def test_lines_are_read_as_they_are_meant(folder: Path) -> None:
    key = sample_key("u://other")
    asked = read_asked(ForgetOptions(urls=Path(listed(folder, "\ufeff# note", "  u://x/#part ", key.upper(), ""))))
    assert asked.keys == {sample_key("u://x/#part"), key}
    asked = read_asked(ForgetOptions(domains=Path(listed(folder, "Bücher.example.", "10.0.0.1"))))
    assert asked.domains == {"bücher.example", "xn--bcher-kva.example", "10.0.0.1"}
    asked = read_asked(ForgetOptions(domains=Path(listed(folder, "Bu\u0308cher。Example"))))
    assert asked.domains == {"bücher.example", "xn--bcher-kva.example"}
    asked = read_asked(ForgetOptions(sha256=Path(listed(folder, "AB" * 32))))
    assert asked.sha256 == {"ab" * 32}


def test_the_proof_is_told_and_an_unknown_url_is_kept_out_all_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build.main([RECIPE, "--runner", "local"])
    gone, unknown = urls(12)[1], "u://never/seen"
    file = listed(folder, gone, unknown)
    dry = json.loads(told(capsys, "--urls", file, "--dry-run", "--json"))
    assert dry["found"]["urls"] == 1 and dry["check"] is None and not read_tombstones(Folder(url="dataset"))
    said = told(capsys, "--urls", file)
    assert "1 of 2 URLs were in the dataset, 1 were not" in said and "nothing is left" in said and "source" in said
    assert read_tombstones(Folder(url="dataset")).keys == {sample_key(gone), sample_key(unknown)}
    again = json.loads(told(capsys, "--urls", file, "--json"))
    assert again["removed"] == {} and again["check"]["left"] == [] and again["found"]["urls_not_there"] == 2
    assert dry["removed"]["partitions"]["rows"] == 1


def test_what_was_not_there_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.main([RECIPE, "--runner", "local"])
    said = told(capsys, "--urls", listed(folder, urls(12)[1], *(f"u://never/{n}" for n in range(7))), "--dry-run")
    assert [line for line in said.splitlines() if line.startswith("not in the dataset: ")] == [
        f"not in the dataset: u://never/{n}" for n in range(5)
    ]
    assert "and 2 more" in said and urls(12)[1] not in said


def test_a_folder_that_is_no_dataset_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("forget", [RECIPE, "--urls", listed(folder, urls(12)[1])])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "is no dataset folder: check `dataset` in the recipe" in said
    assert len(said.splitlines()) == 1 and not (folder / "dataset").exists()


def test_others_with_the_same_bytes_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build.main([RECIPE, "--runner", "local"])
    digest = "ab" * 32
    monkeypatch.setattr(takedown, "_same_bytes", lambda *_: {"k1": digest, "k2": digest})
    file = listed(folder, urls(12)[1])
    found = json.loads(told(capsys, "--urls", file, "--dry-run", "--json"))
    assert (found["same_bytes"], found["same_bytes_samples"]) == ([digest], 2)
    assert "2 other samples have the same bytes and stay: take them down with --sha256" in told(capsys, "--urls", file)


def test_the_help_says_when_to_run_it() -> None:
    assert "Run it while\nnothing builds; run it again if it was interrupted" in (forget.__doc__ or "")


def test_what_is_left_is_told_with_an_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build.main([RECIPE, "--runner", "local"])
    monkeypatch.setattr(takedown, "rewrite_table", lambda *_, **__: Rewritten(removed=Removed()))
    assert forget.main([RECIPE, "--urls", listed(folder, urls(12)[1])]) == 1
    said = capsys.readouterr().out
    assert "SOME IS LEFT" in said and ".parquet: 1 rows" in said


def test_pages_that_show_it_go_and_others_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.main([RECIPE, "--runner", "local"])
    gone = urls(12)[1]
    pages = [folder / "report" / "index.html", folder / "other.html", folder / "older.html"]
    pages[0].parent.mkdir()
    pages[0].write_text(f'<article class="pair" data-key="{sample_key(gone)}">')
    pages[1].write_text(f'<article class="pair" data-key="{sample_key(urls(12)[2])}">{sample_key(gone)}')
    pages[2].write_text('<article class="pair">')  # of a version that did not say whose picture it shows
    file = listed(folder, gone)
    told(capsys, "--urls", file, "--dry-run")
    assert all(page.exists() for page in pages)
    said = told(capsys, "--urls", file)
    assert "report/index.html showed some of it and was removed" in said
    told(capsys, "--urls", file, "--report", "other.html", "older.html")
    assert [page.exists() for page in pages] == [False, True, False]


def test_strangers_words_are_no_key() -> None:
    assert keys_shown('<p data-key=&#34;abc&#34;>data-key=&#34;abc&#34;</p><div data-key="0f">') == {"0f"}
