"""Places that outlive a submitted job, and those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.places import SUBMITTED, check_places
from jobs.plan import PlanOptions
from jobs.recipe import parse
from tests.small_recipe import recipe


def test_folders_that_end_with_the_job_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset 'build/small/dataset' is relative"):
        check_places("build", recipe, [])
    shared = replace(recipe, dataset="s3://bucket/small")
    check_places("build", shared, [])
    for job in ("train", "index", "evaluate", "report"):
        with pytest.raises(ValueError, match=r"runs 'build/small/runs' is relative"):
            check_places(job, shared, [])
    shared = replace(shared, runs="/shared/runs")
    for flags in ([], ["--out", "report"], ["--out=report"], ["--out"]):
        with pytest.raises(ValueError, match="report would write into the job's own copy: give --out an absolute path"):
            check_places("report", shared, flags)
    check_places("report", shared, ["--out=/shared/report"])
    check_places("embeddings", shared, ["--folder", "s3://bucket/embeddings"])


def test_a_submitted_job_checks_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As only its nodes may know where the dataset is."""
    monkeypatch.delenv("DENSEBRIDGE_DATASET", raising=False)
    monkeypatch.setenv(SUBMITTED, "1")
    with pytest.raises(ValueError, match="dataset 'build/dense' is relative"):
        parse(["ella_sd15"], "plan", PlanOptions, "")
    monkeypatch.setenv("DENSEBRIDGE_DATASET", "s3://bucket/dense")
    assert parse(["ella_sd15"], "plan", PlanOptions, "")[0].dataset == "s3://bucket/dense"
