"""Traps of Lightning's that no room has for its own, and the list of all of them with their tests.

``TRAPS`` says for each thing in which a monitor is easily wrong under Lightning which tests would
fail if GradWatch were; those that belong to no other file are here.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from gradwatch import Cause, Config, GradWatch, Report, Status
from gradwatch.rules import Condition, ContractEntry, Rule
from gradwatch.sinks import MemorySink
from tests.conftest import QUIET

TRAPS = {
    "a gradient of an earlier micro-batch is still there": """
        test_stats.test_stale_gradients_are_missing
        test_lightning.test_steps_are_judged_once_under_accumulation
        test_lightning.test_norms_are_those_of_the_whole_window""",
    "zero_grad(set_to_none=False) leaves zeros, never None": """
        test_lightning.test_zeros_that_zero_grad_left_are_missing
        test_stats.test_zeros_left_between_backwards_are_missing""",
    "a parameter in no optimizer is never emptied, and its gradient grows": """
        test_lightning.test_parameters_in_no_optimizer_are_named
        test_traps.test_what_piles_up_in_a_parameter_of_no_optimizer_is_no_norm""",
    "a GAN freezes the other player while one of them trains": """
        test_lightning.test_each_player_is_judged_in_its_own_steps
        test_lightning.test_a_player_that_steps_rarely_has_a_slow_streak""",
    "loss.backward() in manual optimization calls no hook": """
        test_life.test_a_raw_backward_is_pointed_out_once
        test_lightning.test_raw_backwards_accumulate_over_batches""",
    "two gradients may have the same id one after the other": """
        test_stats.test_create_graph_accumulates_out_of_place_and_arrives""",
    "an optimizer inside of backward leaves None behind": """
        test_life.test_an_optimizer_inside_of_backward_is_said_once""",
    "a scaler's gradients are large, and not every optimizer has them unscaled": """
        test_precision.test_norms_are_unscaled_whatever_the_optimizer
        test_precision.test_overflows_while_the_scale_is_sought_are_no_fault""",
    "16-mixed on a CPU is bf16-mixed without a scaler": """
        test_traps.test_half_precision_on_a_cpu_has_no_scale_to_take_out""",
    "norms overflow in half precision, and fail for sparse, empty and complex gradients": """
        test_stats.test_norm_is_right_for_every_dtype
        test_stats.test_sparse_gradients_are_summed_before_they_are_measured
        test_stats.test_mixed_dtypes_are_measured_together
        test_stats.test_nothing_is_measured_as_nothing""",
    "DDP with an unused parameter steps once with gradients of one rank, and says nothing": """
        test_distributed.test_what_ddp_fails_over_is_said_before_it_does""",
    "DDP raises before any rule can fire": """
        test_distributed.test_what_ddp_fails_over_is_said_before_it_does""",
    "the rank that misses nothing hangs in its backward": """
        test_distributed.test_a_rank_that_misses_alone_speaks_without_a_collective""",
    "after the reduction .grad is the group's answer": """
        test_distributed.test_where_unused_parameters_are_allowed_rank_0_tells_the_groups_answer""",
    "with views of buckets all gradients of one share a version": """
        test_distributed.test_zeros_that_lie_in_a_shared_bucket_are_zero_and_never_ok""",
    "a shard of no element has no gradient": """
        test_distributed.test_empty_shards_and_deepspeed_are_unseen
        test_distributed.test_sharded_parameters_have_their_true_norms
        test_distributed.test_fsdp1_cannot_be_watched_and_says_so""",
    "FSDP2 shows other parameters between forward and backward": """
        test_distributed.test_a_cut_before_a_sharded_layer_is_named""",
    "a collective that not every rank calls never ends": """
        test_distributed.test_a_healthy_run_is_the_same_and_calls_one_collective_a_logged_step
        test_distributed.test_a_rule_acts_on_every_rank_in_the_same_step
        test_distributed.test_a_failure_of_ours_on_one_rank_keeps_no_other_waiting""",
    "DeepSpeed shows None for every gradient": """
        test_distributed.test_empty_shards_and_deepspeed_are_unseen""",
    "a mode that is on while compiled code runs is compiled in": """
        test_compile.test_a_healthy_compiled_model_is_never_run_eagerly
        test_compile.test_an_error_in_the_eager_step_restores_compilation""",
    "hooks on modules do not run inside of compiled code": """
        test_compile.test_a_cut_in_a_compiled_model_is_found_in_one_eager_step""",
    "wrappers put their names into those of parameters": """
        test_names.test_wrappers_leave_no_trace_in_names
        test_distributed.test_a_plain_loop_around_ddp""",
    "Lightning lives in two namespaces, and takes a single callback of its own only": """
        test_lightning.test_works_bare_outside_of_a_list
        test_lightning.test_lightning_modules_may_be_typed
        test_lightning.test_the_cli_takes_the_callback_from_yaml""",
    "a checkpoint with an object of ours in it can never be resumed": """
        test_lightning.test_streaks_survive_a_resume
        test_rules.test_state_is_plain""",
    "two callbacks of one key are refused": """
        test_lightning.test_two_callbacks_with_names_share_a_trainer
        test_lightning.test_two_callbacks_without_names_are_refused""",
    "state is loaded between setup and on_fit_start": """
        test_lightning.test_streaks_survive_a_resume""",
    "YAML reads off, on, yes and no as true and false": """
        test_traps.test_no_choice_is_a_word_that_yaml_reads_as_something_else""",
    "should_stop lets the step happen, and exits with 0": """
        test_lightning.test_stop_ends_the_run_cleanly""",
    "after an exception neither on_train_end nor teardown is called": """
        test_harmless.test_nothing_is_left_in_torch
        test_lightning.test_abort_leaves_the_weights_of_the_step_before""",
    "self.log costs a quarter of a millisecond a value, logged or not": """
        test_traps.test_nothing_goes_through_the_trainers_own_log""",
    "the logger of other ranks and of fast_dev_run is a dummy": """
        test_lightning.test_works_without_a_logger
        test_sinks.test_writers_without_a_file""",
    "global_step is not the x-axis of Lightning's curves": """
        test_traps.test_curves_stand_at_the_steps_of_lightnings_own
        test_lightning.test_loggers_of_other_makers_get_the_summary""",
    "an optimizer steps in a batch without any backward": """
        test_lightning.test_batches_without_a_loss_are_no_steps""",
    "the loss that Lightning hands on is divided, and scaled": """
        test_traps.test_the_loss_that_is_named_is_the_users_own""",
    "lazy parameters have neither shape nor hooks": """
        test_traps.test_a_lazy_model_is_watched_from_its_first_batch
        test_watcher.test_lazy_parameters_are_unseen_until_they_have_a_shape""",
    "an optimizer holds tensors that are the model's no more": """
        test_life.test_what_was_replaced_after_the_optimizer_was_built_is_named""",
    "a smoke test of one batch ends before any rule can fire": """
        test_life.test_a_run_shorter_than_any_rule_still_says_what_never_trained""",
    "what a reentrant checkpoint runs is not to be found in the graph": """
        test_traps.test_a_reentrant_checkpoint_that_trains_is_no_cut
        test_life.test_adapters_inside_of_a_checkpoint_that_cuts_them_off""",
    "a tied parameter has two names": """
        test_names.test_tied_parameters_are_one
        test_watcher.test_exclude_matches_any_name_of_a_tied_parameter
        test_rules.test_globs_match_any_alias""",
    "the first factor of an adapter has a gradient of zero in the first step": """
        test_life.test_adapters_that_begin_at_zero_are_no_fault""",
    "a callback is pickled for ddp_spawn": """
        test_life.test_a_callback_is_pickled_for_spawned_processes
        test_distributed.test_spawned_processes_are_watched""",
    "a loss that was made anew trains nothing, and the fit ends well": """
        test_traps.test_a_loss_that_was_made_anew_is_said_before_the_first_step""",
    "the finder of learning rates and bare bones leave out half of the hooks": """
        test_traps.test_a_search_for_a_learning_rate_is_left_alone
        test_traps.test_bare_bones_and_no_batches_end_well""",
    "0 * layer(x), which keeps DDP content, is a gradient of zero": """
        test_traps.test_a_gradient_times_zero_is_a_note_and_stops_nothing""",
    "parameters that inference mode made have no version": """
        test_stats.test_gradients_made_in_inference_mode_are_sensed
        test_stats.test_parameters_made_in_inference_mode_do_not_disturb""",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_tests(trap: str):
    """The tests that are said to stand against a trap are there."""
    asked = TRAPS[trap].split()
    missing = [
        name for name in asked if name.partition(".")[2] not in _tests(name.partition(".")[0])
    ]

    assert asked
    assert missing == []


@functools.cache
def _tests(module: str) -> set[str]:
    text = (Path(__file__).parent / f"{module}.py").read_text()
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}


class Lit(LightningModule):
    """Two layers of one input, both in the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Linear(2, 1, bias=False) for _ in range(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = (self.left(batch) + self.right(batch)).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def train(
    model: LightningModule, config: Any = None, *, batches: int = 4, **options: Any
) -> tuple[GradWatch, list[Report], Trainer]:
    """Train for an epoch of batches of ones, with every step logged."""
    sink = MemorySink()
    watch = GradWatch(config, every_n_steps=1, sinks=[sink])
    data: Any = DataLoader(torch.ones(batches, 2), batch_size=1)  # type: ignore[arg-type]
    trainer = Trainer(**QUIET | {"callbacks": [watch]} | options)
    trainer.fit(model, data)
    return watch, sink.reports, trainer


class Loose(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.left.parameters(), 0.01)


def test_what_piles_up_in_a_parameter_of_no_optimizer_is_no_norm():
    """A gradient that no optimizer uses or empties is not measured, and no rule over sizes is about it."""
    rules = {"rules": [{"name": "large", "when": {"norm_above": 2.0}}]}
    watch, reports, _ = train(Loose(), rules)

    assert [d.cause for d in watch.diagnoses] == [Cause.NOT_IN_OPTIMIZER]
    assert [{*r.statuses.values()} for r in reports] == [{Status.OK}] * 4
    assert [{*r.norms} for r in reports] == [{"left.weight"}] * 4
    assert [r.total_norm for r in reports] == [pytest.approx(2**0.5)] * 4
    assert [alert for r in reports for alert in r.alerts] == []


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_half_precision_on_a_cpu_has_no_scale_to_take_out():
    """Where `16-mixed` turns into bfloat16 without a scaler, norms are those of single precision."""
    _, reports, trainer = train(Lit(), precision="16-mixed")

    assert trainer.scaler is None
    assert [r.total_norm for r in reports] == [pytest.approx(2.0)] * 4


def test_no_choice_is_a_word_that_yaml_reads_as_something_else():
    """Each word that a configuration takes is read from YAML as that word."""
    words = {word for model in (Config, Rule, Condition, ContractEntry) for f in model.model_fields.values()
             for word in _choices(f.annotation)}  # fmt: skip

    assert {"warn", "abort", "missing"} <= words
    assert {word for word in words if yaml.safe_load(word) != word} == set()


def _choices(annotation: Any) -> set[str]:
    """Return the words that a type allows, those of the models inside of it included."""
    if get_origin(annotation) is Literal:
        return {word for word in get_args(annotation) if isinstance(word, str)}
    if hasattr(annotation, "model_fields"):
        return {w for f in annotation.model_fields.values() for w in _choices(f.annotation)}
    if hasattr(annotation, "__members__"):
        return {str(member.value) for member in annotation}
    return {word for inner in get_args(annotation) for word in _choices(inner)}


def test_nothing_goes_through_the_trainers_own_log(tmp_path: Path):
    """What the Trainer collects for its own logging holds the user's values alone."""
    _, _, trainer = train(Lit(), logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)

    assert {*trainer.callback_metrics} == {*trainer.logged_metrics} == {"loss"}


class Players(Lit):
    """Two optimizers in manual optimization, of which the second steps in every other batch."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for turn, (optimizer, layer) in enumerate(
            zip(self.optimizers(), (self.left, self.right), strict=True)
        ):
            if turn and batch_idx % 2:
                continue
            loss = layer(batch).sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), 0.01) for layer in (self.left, self.right)]


@pytest.mark.parametrize(
    ("model", "options", "steps"),
    [
        (Lit, {}, [1, 3, 5]),
        (Players, {}, [1, 3, 5]),
        (Lit, {"accumulate_grad_batches": 2}, [1, 2]),
    ],
    ids=["plain", "two optimizers", "accumulation"],
)
def test_curves_stand_at_the_steps_of_lightnings_own(
    model: type[Lit], options: dict[str, Any], steps: list[int], tmp_path: Path
):
    """A card of GradWatch's has the x-values that Lightning gives the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data: Any = DataLoader(torch.ones(6, 2), batch_size=1)  # type: ignore[arg-type]
    logger = TensorBoardLogger(tmp_path, "", "")
    defaults = QUIET | {"logger": logger, "log_every_n_steps": 2, "callbacks": [GradWatch()]}
    Trainer(**defaults | options).fit(model(), data)

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curves = {
        tag: sorted({event.step for event in events.Scalars(tag)})
        for tag in ("loss", "gradwatch/norm_log10_total")
    }
    assert curves["loss"] == [step for step in steps if step % 2]
    assert curves["gradwatch/norm_log10_total"] == curves["loss"]


class Remade(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return torch.tensor(loss.item(), requires_grad=True)  # <- here


@pytest.mark.filterwarnings("ignore:.*trainer.logger.")
def test_a_loss_that_was_made_anew_is_said_before_the_first_step():
    """The run of which no one would complain is diagnosed in its first step, at the user's call."""
    watch, reports, trainer = train(Remade())

    assert trainer.state.finished
    (diagnosis,) = watch.diagnoses
    assert [report.step for report in reports if report.diagnoses][0] == 0  # noqa: RUF015
    assert diagnosis.parameters == ("left.weight", "right.weight")
    assert "torch.tensor(loss.item(), requires_grad=True)" in str(diagnosis)


class Halved(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        cut = self.right(batch).detach()  # <- here
        return (self.left(batch) + cut).sum()


@pytest.mark.parametrize("windows", [1, 2])
def test_the_loss_that_is_named_is_the_users_own(windows: int):
    """The division by the number of micro-batches, which Lightning adds, is in no diagnosis."""
    watch, _, _ = train(Halved(), accumulate_grad_batches=windows)

    (diagnosis,) = watch.diagnoses
    assert diagnosis.cause is Cause.DETACHED
    assert Path(diagnosis.site.file).name == Path(__file__).name
    assert "closure" not in str(diagnosis)


class Lazy(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.LazyLinear(1, bias=False)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_model_is_watched_from_its_first_batch():
    """A layer that gets its shape in the first forward is watched like the others, and nothing is said."""
    watch, reports, _ = train(Lazy())

    assert watch.diagnoses == ()
    assert [{*r.statuses.values()} for r in reports] == [{Status.OK}] * 4


class Checkpointed(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        hidden: Any = checkpoint(self.left, batch.requires_grad_(), use_reentrant=True)
        return (hidden + self.right(batch)).sum()


def test_a_reentrant_checkpoint_that_trains_is_no_cut():
    """Parameters that only the inner backward of a checkpoint reaches have a gradient, and no diagnosis."""
    watch, reports, _ = train(Checkpointed())

    assert watch.diagnoses == ()
    assert [{*r.statuses.values()} for r in reports] == [{Status.OK}] * 4


def test_a_search_for_a_learning_rate_is_left_alone():
    """`lr_find` tries what it would without us, and the fit after it is watched from its first step."""
    data: Any = DataLoader(torch.ones(4, 2), batch_size=1)  # type: ignore[arg-type]
    rates = []
    for callbacks in ([], [GradWatch(every_n_steps=1)]):
        trainer = Trainer(**QUIET | {"callbacks": callbacks})
        found: Any = Tuner(trainer).lr_find(Rated(), data, num_training=3, update_attr=False)
        rates.append(found.results)
        trainer.fit(Rated(), data)
    (watch,) = callbacks

    assert rates[0] == rates[1]
    assert watch.diagnoses == ()
    assert (watch.report.step, {*watch.report.statuses.values()}) == (3, {Status.OK})


def test_bare_bones_and_no_batches_end_well():
    """A Trainer without its extras, and a fit without a batch, end as they would without us."""
    data: Any = DataLoader(torch.ones(4, 2), batch_size=1)  # type: ignore[arg-type]
    watch = GradWatch(every_n_steps=1)
    bare = Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[watch])
    bare.fit(Quiet(), data)
    empty, reports, _ = train(Lit(), limit_train_batches=0)

    assert bare.state.finished
    assert (watch.diagnoses, watch.report.step) == ((), 3)
    assert (empty.diagnoses, reports) == ((), [])


class Rated(Lit):
    lr = 0.01

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


class Quiet(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return (self.left(batch) + self.right(batch)).sum()


class TimesZero(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.left(batch).sum() + 0 * self.right(batch).sum()
        self.log("loss", loss)
        return loss


def test_a_gradient_times_zero_is_a_note_and_stops_nothing():
    """A layer that takes part with a factor of zero is no missing one, whatever the rule over those."""
    stopping = EarlyStopping("loss", patience=100, check_on_train_epoch_end=True)
    sink = MemorySink()
    watch = GradWatch(for_steps=1, action="abort", every_n_steps=1, sinks=[sink])
    data: Any = DataLoader(torch.ones(4, 2), batch_size=1)  # type: ignore[arg-type]
    trainer = Trainer(**QUIET | {"callbacks": [watch, stopping]})
    trainer.fit(TimesZero(), data)

    assert trainer.state.finished
    assert [(d.cause, str(d.severity)) for d in watch.diagnoses] == [(Cause.ZERO_GRADIENT, "note")]
    assert [r.statuses["right.weight"] for r in sink.reports] == [Status.ZERO] * 4
