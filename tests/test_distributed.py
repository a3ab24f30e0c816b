"""Two gloo processes: who says what, when a collective is called, and that no process waits for another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from gradwatch import Cause, Diagnosis, GradWatch, Site, Status, Watcher
from gradwatch._distributed import Group
from gradwatch._stats import is_hidden
from gradwatch.report import Severity
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET, SCRIPTED_NET
from tests.ranks import Lit, Sharded

pytestmark = pytest.mark.distributed

LIGHTNING_OWN = 2
"""Collectives that Lightning calls in a run of its own."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run all scenarios, and return a function that reads what a rank answered."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[1]
    subprocess.run(  # noqa: S603
        [sys.executable, Path(__file__).with_name("ranks.py"), folder],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=150,
        check=True,
    )

    def read(name: str, rank: int) -> tuple[Any, str]:
        err = (folder / f"{name}.{rank}.err").read_text()
        answer = folder / f"{name}.{rank}.json"
        assert answer.exists(), err
        return json.loads(answer.read_text()), err

    return read


def own_collectives(answer: Any) -> list[str]:
    calls: list[str] = answer["collectives"][LIGHTNING_OWN:]
    return calls


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "shared"), [("healthy", 3), ("accumulated", 2)])
def test_a_healthy_run_is_the_same_and_calls_one_collective_a_logged_step(
    ranks: Any, name: str, shared: int, rank: int
):
    """Weights are those of a run without GradWatch; the first and each logged step cost one all-reduce."""
    (bare, watched), err = ranks(name, rank)

    assert watched["weights"] == bare["weights"]
    assert len(bare["collectives"]) == LIGHTNING_OWN
    assert own_collectives(watched) == ["all_reduce"] * shared
    assert (watched["diagnoses"], watched["alerts"], err) == ([], [], "")
    # Rank 0 has gradients of norm 2, rank 1 of norm 4: what the optimizer uses is their mean.
    assert all(set(norms.values()) == {3.0} for norms in watched["norms"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["unused_everywhere", "unused_in_a_window"])
def test_what_ddp_fails_over_is_said_before_it_does(ranks: Any, name: str, rank: int):
    """Each rank that misses a gradient names it with its cause and the remedy, and the later error says it again."""
    answer, err = ranks(name, rank)

    assert [d[:2] for d in answer["diagnoses"]] == [["unused", ["b.weight", "c.weight"]]]
    assert f"rank {rank} of 2 has none here: the next forward raises" in err
    assert "pass `find_unused_parameters=True` to DDP" in err
    assert (answer["error"], answer["global_step"]) == ("RuntimeError", 1)
    assert "warning[unused]: `b.weight` and `c.weight` get no gradient" in answer["error_notes"][0]
    assert own_collectives(answer) == []


def test_a_rank_that_misses_alone_speaks_without_a_collective(ranks: Any):
    """While the complete rank hangs in its backward, the other one has said why."""
    (waiting, _), (missing, err) = ranks("unused_on_one_rank", 0), ranks("unused_on_one_rank", 1)

    assert (waiting["global_step"], waiting["diagnoses"]) == (0, [])
    assert "warning[unused]: `c.weight` gets no gradient" in err
    assert "rank 1 of 2 has none here" in err
    assert [own_collectives(waiting), own_collectives(missing)] == [[], []]


@pytest.mark.parametrize("name", ["searched", "searched_with_views", "static"])
def test_where_unused_parameters_are_allowed_rank_0_tells_the_groups_answer(ranks: Any, name: str):
    """What no rank uses is missing; what one rank uses is not; and one rank alone prints it."""
    (first, err), (second, silence) = ranks(name, 0), ranks(name, 1)

    expected = [["unused", ["c.weight"], ["module `c` did not run in this step"]]]
    assert first["diagnoses"] == second["diagnoses"] == expected
    assert err.count("warning[unused]: `c.weight` gets no gradient") == 1
    assert silence == ""
    # One gather, in the step with the news; then one all-reduce a logged step.
    gathered = ["all_reduce", "all_gather_object", "all_reduce", "all_reduce"]
    assert [own_collectives(first), own_collectives(second)] == [gathered, gathered]


def test_zeros_that_lie_in_a_shared_bucket_are_zero_and_never_ok(ranks: Any):
    """With views of buckets and zeros left in them, a layer that trains no more is told as zero."""
    for rank in (0, 1):
        answer, _ = ranks("zeros_in_views", rank)
        assert [s["c.weight"] for s in answer["statuses"]] == ["ok", "zero", "zero", "zero"]
        assert [{s["a.weight"], s["b.weight"]} for s in answer["statuses"]] == [{"ok"}] * 4
        assert [d[:2] for d in answer["diagnoses"]] == [["zero_gradient", ["c.weight"]]]


def test_a_diagnosis_says_on_which_ranks_it_holds(ranks: Any):
    """Ranks that find another cause for the same parameter are named in one diagnosis."""
    (answer, err), _ = ranks("two_causes", 0), ranks("two_causes", 1)

    ((cause, parameters, notes),) = answer["diagnoses"]
    assert (cause, parameters) == ("detached", ["c.weight"])
    assert notes[1:] == ["on 1 of 2 ranks (rank 0)", "on rank 1 the cause is unused"]
    assert err.count("warning[") == 1


@pytest.mark.parametrize(
    ("name", "error", "alert"),
    [
        ("aborted", "DisconnectedParameterError", ["dead", 1]),
        ("aborted_by_size", "GradientAlertError", ["large", 1]),
        ("stopped", None, ["dead", 1]),
    ],
)
def test_a_rule_acts_on_every_rank_in_the_same_step(
    ranks: Any, name: str, error: str | None, alert: list[Any]
):
    """Both ranks end with the same alert in the same step, the error before the optimizer writes."""
    answers = [ranks(name, rank)[0] for rank in (0, 1)]

    assert [(a["error"], a["alerts"]) for a in answers] == [(error, [alert])] * 2
    assert [a["global_step"] for a in answers] == [1 if error else 2] * 2
    assert answers[0]["weights"] == answers[1]["weights"]


def test_a_failure_of_ours_on_one_rank_keeps_no_other_waiting(ranks: Any):
    """A rank on which we fail tells the others at their next collective, and all train to the end."""
    (failed, err), (other, _) = ranks("failing", 0), ranks("failing", 1)

    assert [failed["global_step"], other["global_step"]] == [8, 8]
    assert failed["weights"] == other["weights"]
    assert "GradWatch failed and has switched itself off" in err
    # Steps 0, 1 and 3 are shared; in step 3 the failed rank excuses itself, and none is shared after it.
    assert [own_collectives(failed), own_collectives(other)] == [["all_reduce"] * 3] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_plain_loop_around_ddp(ranks: Any, rank: int):
    """A `Watcher` of a DDP module names parameters without `module.`, and only rank 0 prints."""
    answer, err = ranks("plain", rank)

    assert answer == [[], [["detached", ["0.weight", "0.bias"]]]]
    assert ("warning[detached]" in err) is (rank == 0)


def test_sharded_parameters_have_their_true_norms(ranks: Any):
    """Under FSDP2 norms are those of one process, an empty shard is not missing, and names are clean."""
    sink = MemorySink()
    data: Any = DataLoader(torch.ones(4, 4), batch_size=1)  # type: ignore[arg-type]
    Trainer(**QUIET, callbacks=[GradWatch(every_n_steps=2, sinks=[sink])]).fit(
        Sharded(cut=False, shard=False), data
    )
    for rank in (0, 1):
        (bare, watched, _), _ = ranks("sharded", rank)

        assert watched["weights"] == bare["weights"]
        assert own_collectives(watched) == ["all_reduce"] * 3
        assert {status for s in watched["statuses"] for status in s.values()} == {"ok"}
        assert watched["norms"] == [pytest.approx(report.norms) for report in sink.reports]
        assert watched["totals"] == pytest.approx([r.total_norm for r in sink.reports])


def test_a_cut_before_a_sharded_layer_is_named(ranks: Any):
    """The parameters that FSDP2 puts together for the forward pass are followed under their names."""
    ((_, _, cut), err), (_, silence) = ranks("sharded", 0), ranks("sharded", 1)

    assert [d[:2] for d in cut["diagnoses"]] == [["detached", ["un.weight"]]]
    assert "side.detach()" in err
    assert silence == ""


def test_fsdp1_cannot_be_watched_and_says_so(ranks: Any):
    """In flat pieces no parameter is called dead: one line says that nothing is watched."""
    answer, err = ranks("flattened", 0)

    assert answer == []
    lines = [line for line in err.splitlines() if "FSDP1 keeps gradients in flat pieces" in line]
    assert len(lines) == 2  # one for each run
    assert "warning[" not in err


# ---- one process


def diagnosis(cause: Cause, *names: str, line: int = 1) -> Diagnosis:
    return Diagnosis(Severity.WARNING, cause, Status.MISSING, names, Site("net.py", line))


def test_many_ranks_are_counted_and_not_all_listed():
    """What holds on many of several hundred ranks is told with their number and the first few."""
    group = object.__new__(Group)
    group.size = 400
    odd = diagnosis(Cause.DETACHED, "a", line=7)
    brought = [[odd] if rank % 2 else [diagnosis(Cause.UNUSED, "a")] for rank in range(400)]

    (joined,) = group._joined(brought)

    assert joined.notes == (
        "on 200 of 400 ranks (ranks 0, 2, 4, 6, 8, 10, 12, 14 and 192 more)",
        "on ranks 1, 3, 5, 7, 9, 11, 13, 15 and 192 more the cause is detached (net.py:7)",
    )


def test_without_a_process_group_there_is_no_group():
    """A model that one process trains is in no group."""
    assert Group.of(Lit([["a"], ["a"]])) is None


def test_empty_shards_and_deepspeed_are_unseen(caplog: pytest.LogCaptureFixture):
    """Where `.grad` says nothing, parameters are unseen, and for DeepSpeed that is said once."""
    model = torch.nn.ParameterDict(
        {"full": torch.ones(2), "empty": torch.ones(0), "zero": torch.ones(2)}
    )
    model["zero"].ds_id = 3  # as DeepSpeed marks its parameters
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    hidden = {name: is_hidden(parameter) for name, parameter in model.items()}
    assert hidden == {"full": False, "empty": True, "zero": True}
    sink = MemorySink()
    watcher = Watcher(model, optimizers=[optimizer], sinks=[sink], every_n_steps=1)
    with watcher, watcher.step():
        model["full"].sum().backward()
        optimizer.step()

    assert sink.reports[0].statuses == {
        "full": Status.OK,
        "empty": Status.UNSEEN,
        "zero": Status.UNSEEN,
    }
    assert [r.getMessage().partition(",")[0] for r in caplog.records if r.name == "gradwatch"] == [
        "DeepSpeed keeps gradients to itself"
    ]


def test_a_failure_before_the_run_began_is_a_log_record(caplog: pytest.LogCaptureFixture):
    """A process whose GradWatch never came to its feet trains on, and does not raise at a shared step."""
    watcher = Watcher(torch.nn.Linear(1, 1))
    watcher._off = True
    watcher._group = object.__new__(Group)
    watcher._group.broken = False

    watcher.before_step(None)
    watcher.end_batch()

    said = [record.getMessage() for record in caplog.records if record.name == "gradwatch"]
    assert said == ["the other ranks could not be told"]


SPAWNED = (
    SCRIPTED_NET
    + """
if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn_find_unused_parameters_true", max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[GradWatch()],
    )
    trainer.fit(Net(), DataLoader(torch.ones(8, 2)))
    print("trained", trainer.state.finished)
"""
)


@pytest.mark.slow
def test_spawned_processes_are_watched(tmp_path: Path):
    """Under ``ddp_spawn`` the callback travels to the processes, and the first of them names the line."""
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run(  # noqa: S603
        [sys.executable, script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.stdout.strip().endswith("trained True"), done.stderr
    assert done.stderr.count("warning[detached]: `right.*` get no gradient") == 1
    assert done.stderr.count("spawned.py:16 in Net.training_step") == 1
