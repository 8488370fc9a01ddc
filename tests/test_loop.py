"""The loop: resuming changes nothing, nothing is lost, what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.captions import tokenizer_id
from pipeline.storage import Folder
from tests.training_fixtures import (
    assert_same_run,
    language_model_config,
    log_of,
    make_denoiser,
    make_language_model,
    make_view,
    make_world,
    training_config,
)
from training import encoding, loop, step
from training.batches import Batches
from training.configuration import Phase, ValidationConfig
from training.encoding import encode
from training.generation import generate
from training.language_models import LanguageModel
from training.loop import train
from training.processes import start_processes
from training.releases import load_bridge
from training.step import losses_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Path) -> Path:
    train(training_config(world), dataset=dataset(world), run=world / "straight")
    return world / "straight"


def dataset(world: Path) -> Folder:
    return Folder(url=str(world / "dataset"))


def test_a_run_trains_logs_and_releases(world: Path, straight: Path) -> None:
    log = log_of(straight)
    assert [line["samples"] for line in log] == [24, 48, 72, 84]
    assert [line["phase"] for line in log] == [0, 0, 1, 1]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and len(line["bins"]) == 10 for line in log)
    start = loop.load_parts(training_config(world), start_processes(training_config(world))).bridge.connector
    start = start.state_dict()
    end = load_file(straight / "release" / "connector.safetensors")
    assert sum(not torch.equal(start[name], end[name]) for name in end) > 30
    assert sorted(path.name for path in straight.glob("checkpoint-*")) == [
        "checkpoint-000000072",
        "checkpoint-000000084",
    ]
    assert list((straight / "tensorboard").iterdir())


@pytest.mark.parametrize("stop_at", [[24], [36, 60], [48]])
def test_stopped_and_resumed_is_bit_equal(
    world: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: list[int]
) -> None:
    """SIGTERM in phase 1, in phase 2, on the edge between them, and between two log lines."""
    commit = loop._commit

    def interrupted(sitting, state, *rest):
        if state.samples + 2 * sitting.config.phases[state.phase].batch in stop_at:  # seen at the edge of the next step
            os.kill(os.getpid(), signal.SIGTERM)
        commit(sitting, state, *rest)

    monkeypatch.setattr(loop, "_commit", interrupted)
    for samples in stop_at:
        with pytest.raises(SystemExit) as stopped:
            train(training_config(world), dataset=dataset(world), run=tmp_path)
        assert stopped.value.code == 75
        assert sorted(tmp_path.glob("checkpoint-*"))[-1].name == f"checkpoint-{samples:09d}"
    result = train(training_config(world), dataset=dataset(world), run=tmp_path)
    assert (result.steps, result.samples) == (7, 84)
    assert_same_run(tmp_path, straight)


def test_asked_to_stop_in_the_last_step_it_ends(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that belongs to an end: there is nothing left to go on with."""
    commit = loop._commit

    def interrupted(sitting, state, *rest):
        if state.samples == 60:
            os.kill(os.getpid(), signal.SIGTERM)  # seen at the edge of the step from 72 to 84
        commit(sitting, state, *rest)

    monkeypatch.setattr(loop, "_commit", interrupted)
    looked = ValidationConfig(every=1000, resolution=8, prompts=("red",), steps=1, best="off")
    result = train(training_config(world, validation=looked), dataset=dataset(world), run=tmp_path)
    seen = [json.loads(line)["samples"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert result.samples == 84 and (tmp_path / "release").is_dir() and seen == [0, 84]


def test_no_batch_is_read_that_is_not_trained_on(
    world: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next batch is encoded ahead; and a run that has ended reads none."""
    positions: list[list[int]] = []
    encode = encoding.encode

    def counted(parts, batch, draws):
        positions.append(batch.positions)
        return encode(parts, batch, draws)

    monkeypatch.setattr(encoding, "encode", counted)
    monkeypatch.setattr(loop, "encodes_ahead", lambda *_: True)
    for _ in range(2):
        train(training_config(world), dataset=dataset(world), run=tmp_path)
        assert sum(map(len, positions)) == 84
    assert_same_run(tmp_path, straight)


def test_a_crash_between_checkpoints_repeats_exactly(
    world: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, commit = training_config(world, checkpoint_every=24), loop._commit

    def crash(sitting, state, *rest):
        commit(sitting, state, *rest)
        if state.samples == 84:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_commit", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset=dataset(world), run=tmp_path)
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1]
    assert newest.name == "checkpoint-000000072"
    (newest / "optimizer.safetensors").write_bytes(b"cut")  # the newest is damaged too: back to the one before
    train(config, dataset=dataset(world), run=tmp_path)
    assert_same_run(tmp_path, straight)
    assert len(list(tmp_path.glob("damaged-*"))) == 1


def test_two_processes_train_as_one(world: Path, straight: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.training_fixtures import training_config; from pipeline.storage import Folder\n"
        "from training.loop import train\n"
        "if __name__ == '__main__':\n"
        "    world = Path(sys.argv[1])\n"
        "    train(training_config(world), dataset=Folder(url=str(world / 'dataset')), run=Path(sys.argv[2]))\n"
        "    from accelerate import PartialState; assert PartialState().num_processes == 2\n"
    )
    paths = str(Path(__file__).parents[1])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(world)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(run / "release" / "connector.safetensors") for run in (tmp_path / "run", straight))
    for name in ours:
        one, two = ours[name], theirs[name]
        if name.endswith("in_proj_bias"):
            # A key's bias adds the same to all logits: its gradient is zero but for rounding, which Adam makes large.
            one, two = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (one, two))
        assert torch.allclose(one, two, atol=5e-5), name
    for one, two in zip(log_of(straight), log_of(tmp_path / "run"), strict=True):
        assert one["bins"] == pytest.approx(two["bins"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)
    # One process goes on where two left off: their last checkpoint is spoilt, so it trains the rest from the one before.
    (tmp_path / "run" / "checkpoint-000000084" / "checkpoint.json").unlink()
    train(training_config(world), dataset=dataset(world), run=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("damaged-*"))) == 1
    ours = load_file(tmp_path / "run" / "release" / "connector.safetensors")
    for name in ours:
        one, two = ours[name], theirs[name]
        if name.endswith("in_proj_bias"):
            # A key's bias adds the same to all logits: its gradient is zero but for rounding, which Adam makes large.
            one, two = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (one, two))
        assert torch.allclose(one, two, atol=5e-5), name


def test_a_dropped_caption_is_the_empty_prompt_of_generation(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the language model reads for a dropped caption is what it reads for guidance, by the same method."""
    read: list[list[int]] = []
    encode = LanguageModel.encode_where_finite

    def spy(self, ids, names=None, *, appended=None):
        read.extend(one.tolist() for one in ids)
        return encode(self, ids, names)

    monkeypatch.setattr(LanguageModel, "encode_where_finite", spy)
    config = training_config(world, caption_drop=1.0, phases=training_config(world).phases[:1])
    release = train(config, dataset=dataset(world), run=tmp_path).release
    trained, read = read, read[:0]
    language_model, denoiser = config.language_model.load(), config.denoiser.load()
    bridge = load_bridge(release, language_model=language_model, denoiser=denoiser)
    generate(
        language_model=language_model, bridge=bridge, denoiser=denoiser, prompts=["red round"], resolution=8,
        steps=1, guidance=3.0, seeds=[0], batch=1,
    )  # fmt: skip
    assert len(trained) == 48 and len(read) == 2 and all(ids == read[-1] for ids in trained) and read[0] != read[-1]


def test_micro_batches_do_not_change_the_gradient(world: Path, straight: Path, tmp_path: Path) -> None:
    phases = tuple(dataclasses.replace(phase, micro_batch=4) for phase in training_config(world).phases)
    train(training_config(world, phases=phases), dataset=dataset(world), run=tmp_path)
    ours, theirs = (load_file(run / "release" / "connector.safetensors") for run in (tmp_path, straight))
    for name in ours:
        one, two = ours[name], theirs[name]
        if name.endswith("in_proj_bias"):
            # A key's bias adds the same to all logits: its gradient is zero but for rounding, which Adam makes large.
            one, two = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (one, two))
        assert torch.allclose(one, two, atol=5e-5), name


def test_a_bad_sample_keeps_its_slot_and_weighs_nothing(world: Path, tmp_path: Path) -> None:
    """A cut JPEG is in the ledger, and the gradient is that of the mean over the others."""
    name = tokenizer_id(str(world / "models" / "t5"), None)
    view = make_view(tmp_path / "dataset", "broken", 12, name, broken=(5,))
    phase = Phase(view="broken", resolution=8, samples=24, batch=12, micro_batch=12)
    config = training_config(world, phases=(phase,), log_every=1)
    result = train(config, dataset=Folder(url=str(tmp_path / "dataset")), run=tmp_path / "run")
    assert (result.samples, result.bad, result.skipped) == (24, 2, 0)
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in ledger] == ["0005", "0005"]
    assert all("truncated" in line["reason"] for line in ledger)
    parts = loop.load_parts(config, start_processes(config))
    with Batches([view], loop.batch_config(config, 0, parts)) as batches:
        first = encode(parts, next(batches), "")
    losses, weights = losses_of(parts, first, ""), first.weights
    assert weights.sum() == 11
    mean = losses[weights > 0].mean()
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in parts.bridge.parameters()]).norm()
    first = log_of(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(float(mean), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_bad_samples_in_a_row_stop_a_run(world: Path, tmp_path: Path) -> None:
    """A shard that is lost halfway, which the share of bad samples would show late."""
    name = tokenizer_id(str(world / "models" / "t5"), None)
    make_view(tmp_path / "dataset", "lost", 24, name, broken=tuple(range(24)))
    phase = Phase(view="lost", resolution=8, samples=120, batch=6, micro_batch=6)
    config = training_config(world, phases=(phase,), bad_share=1.0, bad_in_a_row=15)
    with pytest.raises(
        ValueError, match=r"18 samples in a row could not be used, bad_in_a_row is 15; the last is '\d+': OSError"
    ):
        train(config, dataset=Folder(url=str(tmp_path / "dataset")), run=tmp_path / "run")
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 18 and {line["shard"] for line in ledger} == {f"views/lost/1/shard-{n}.tar" for n in (0, 1)}


def test_too_many_bad_samples_stop_a_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the console names each of their shards once."""
    name = tokenizer_id(str(world / "models" / "t5"), None)
    make_view(tmp_path / "dataset", "half", 24, name, broken=tuple(range(0, 24, 2)))
    phase = Phase(view="half", resolution=8, samples=120, batch=6, micro_batch=6)
    config = training_config(world, phases=(phase,), bad_share=0.1)
    with pytest.raises(
        ValueError, match=r"of \d+ samples could not be used, bad_share is 0.1; the last is '\d+': OSError"
    ):
        train(config, dataset=Folder(url=str(tmp_path / "dataset")), run=tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("weighs nothing") == 2
    assert all(said.count(f"shard views/half/1/shard-{number}.tar: sample '") == 1 for number in (0, 1))


def test_what_is_not_finite_is_skipped_within_a_budget(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        step, "sample_losses", lambda predicted, target: (predicted - target).flatten(1).mean(1) * torch.nan
    )
    with pytest.raises(FloatingPointError, match="skip_budget is 2"):
        train(training_config(world, skip_budget=2), dataset=dataset(world), run=tmp_path)
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["positions"] for line in skipped] == [[0, 12], [12, 24], [24, 36]]


def test_mismatches_are_refused_by_name(world: Path, straight: Path, tmp_path: Path) -> None:
    base = training_config(world)
    first, second = base.phases
    for changes, field in (
        ({"seed": 4}, "training.seed"),
        ({"caption_drop": 0.2}, "training.caption_drop"),
        ({"phases": (dataclasses.replace(first, rate=1.0), second)}, r"phases\[0\].rate"),
        ({"connector": dataclasses.replace(base.connector, queries=5)}, "connector.queries"),
        ({"language_model": language_model_config(world, dtype="bfloat16")}, "language_model.dtype"),
    ):
        with pytest.raises(ValueError, match=f"cannot be resumed: {field} is"):
            train(training_config(world, **changes), dataset=dataset(world), run=straight)
    with pytest.raises(ValueError, match=r"connector.in_width is 9, the models here want 16"):
        wrong = dataclasses.replace(base.connector, in_width=9)
        train(training_config(world, connector=wrong), dataset=dataset(world), run=tmp_path)
    with pytest.raises(ValueError, match="view 'small' holds images of 8 px, the phase wants 16"):
        wrong_phase = dataclasses.replace(second, view="small")
        train(training_config(world, phases=(first, wrong_phase)), dataset=dataset(world), run=tmp_path)


def test_a_view_that_changed_under_a_run_is_told(world: Path, tmp_path: Path) -> None:
    name = tokenizer_id(str(world / "models" / "t5"), None)
    for number, samples in enumerate((24, 30)):
        make_view(tmp_path / str(number), "small", samples, name)
    config = training_config(world, phases=training_config(world).phases[:1])
    train(config, dataset=Folder(url=str(tmp_path / "0")), run=tmp_path / "run")
    with pytest.raises(ValueError, match=r"view 'small' has changed since: build it as it was, or remove .*/run to"):
        train(config, dataset=Folder(url=str(tmp_path / "1")), run=tmp_path / "run")


def test_a_finished_run_can_be_lengthened(world: Path, straight: Path, tmp_path: Path) -> None:
    base = training_config(world)
    train(training_config(world, phases=base.phases[:1]), dataset=dataset(world), run=tmp_path)
    train(base, dataset=dataset(world), run=tmp_path)
    assert_same_run(tmp_path, straight)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose VAE draws from a posterior, and whose view "small" holds latents."""
    root = tmp_path_factory.mktemp("encoded")
    make_denoiser(root / "models" / "base", drawn=True)
    name = tokenizer_id(str(make_language_model(root / "models" / "t5")), None)
    make_view(root / "dataset", "small", 24, name, vae=root / "models" / "base" / "vae")
    return root


def test_a_views_latents_train_as_its_pictures_do(encoded: Path, tmp_path: Path) -> None:
    """The same losses up to the latents' 16 bits, and no VAE in memory."""
    phase = Phase(view="small", resolution=8, samples=24, batch=6, micro_batch=6, latents="view")
    stored = training_config(encoded, phases=(phase,), log_every=1)
    online = training_config(encoded, phases=(dataclasses.replace(phase, latents="off"),), log_every=1)
    for config, run in ((stored, "stored"), (online, "online")):
        train(config, dataset=dataset(encoded), run=tmp_path / run)
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("stored", "online"))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-3) and ours != theirs
    assert loop.load_parts(stored, start_processes(stored)).denoiser.vae is None
    with pytest.raises(ValueError, match=r"cannot be resumed: phases\[0\].latents is"):
        train(online, dataset=dataset(encoded), run=tmp_path / "stored")


def test_latents_of_another_vae_or_size_are_refused(encoded: Path, world: Path, tmp_path: Path) -> None:
    phase = Phase(view="small", resolution=8, samples=24, batch=6, micro_batch=6, latents="view")
    config = training_config(encoded, phases=(phase,))
    for where, changed, said in (
        (world, config, r"view 'small' has no latents: add an EncodeLatents stage for it"),
        (
            encoded,
            training_config(world, phases=(phase,)),
            r"were made by the VAE \w+, the denoiser's is \w+: encode them",
        ),
        (
            encoded,
            training_config(encoded, phases=(dataclasses.replace(phase, resolution=4),)),
            "are of pictures of 8 px",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            train(changed, dataset=dataset(where), run=tmp_path)
    with pytest.raises(ValueError, match="crop is 'random', but the latents of view 'small' are of the middle"):
        training_config(encoded, phases=(phase,), crop="random")
    with pytest.raises(
        ValueError, match="flip is set, but the latents of view 'small' are of its pictures as they are"
    ):
        training_config(encoded, phases=(phase,), flip=True)
    with pytest.raises(ValueError, match="latents is 'all': choose one of off, view"):
        dataclasses.replace(phase, latents="all")
