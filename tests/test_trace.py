"""The trace: what is recorded of a pass, what is not, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gradwatch import Cause, Status, diagnose
from gradwatch._calls import Kind, Wrapper, public_name, traits_of
from gradwatch._trace import Trace

ROW = torch.ones(1, 2)


def traced(model, *, run):
    trace = Trace(dict(model.named_parameters()), dict(model.named_modules()))
    trace.start()
    try:
        run()
    finally:
        trace.stop()
    return trace


def names(trace):
    return [op.name.rpartition(".")[2] for op in trace.ops]


def test_operations_are_recorded_in_order_with_what_they_read():
    """Each call is one operation, linked to the values it read."""
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)

    def run():
        (model(x) * 2).sum()

    trace = traced(model, run=run)

    assert names(trace) == ["linear", "mul", "sum"]
    assert [op.inputs for op in trace.ops[1:]] == [trace.ops[0].outputs, trace.ops[1].outputs]
    assert [trace.values[n].parameter for n in trace.ops[0].inputs] == [None, "weight", "bias"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are never forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_process_that_is_forked_in_a_pass_records_nothing():
    """What a worker of a data loader computes is no part of the pass, in which its parent goes on."""
    model = nn.Linear(2, 1)

    def run():
        child = os.fork()
        _ = ROW + 1
        if not child:
            os._exit(len(trace.ops))
        counts.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    counts: list[int] = []
    trace = Trace(dict(model.named_parameters()), {})
    trace.start()
    run()
    trace.stop()

    assert (counts, names(trace)) == ([0], ["add"])


def test_attributes_and_shapes_are_no_operations():
    """Reading a shape, a dtype, a flag or a length reads no value."""
    model = nn.Linear(2, 1)

    def run():
        weight = model.weight
        _ = weight.shape, weight.dtype, weight.requires_grad, weight.size(), weight.dim()
        _ = len(weight), weight.grad, f"{weight}", weight.is_contiguous()

    assert traced(model, run=run).ops == []


def test_a_write_gives_every_alias_a_new_value():
    """After a write through a view, what reads the base reads the written value."""
    model = nn.Linear(2, 2)

    def run():
        base = model(ROW) * 1
        view = base[0]
        view.mul_(2)
        base.sum()

    trace = traced(model, run=run)

    assert names(trace) == ["linear", "mul", "__getitem__", "mul_", "sum"]
    assert set(trace.ops[4].inputs) < set(trace.ops[3].outputs)


def test_a_parameter_over_computed_memory_is_a_rewrap():
    """`nn.Parameter(h)` is recognised by the memory it shares."""
    model = nn.Linear(2, 2)
    trace = traced(model, run=lambda: nn.Parameter(model(ROW)).sum())

    assert [op.kind for op in trace.ops] == [Kind.PLAIN, Kind.REWRAP, Kind.PLAIN]


def test_a_tensor_made_out_of_sight_is_linked_through_its_node():
    """What a paused trace did not see is joined to the parameters through `grad_fn`."""
    model = nn.Linear(2, 2)
    trace = Trace(dict(model.named_parameters()), dict(model.named_modules()))
    trace.start()
    with trace.paused():
        h = model(ROW)
    h.sum()
    trace.stop()

    assert [op.kind for op in trace.ops] == [Kind.LINK, Kind.PLAIN]
    assert {trace.values[n].parameter for n in trace.ops[0].inputs} == {"weight", "bias"}


def test_what_an_optimizer_does_is_not_recorded():
    """An optimizer step is noted as a step, not as operations."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())

    def run():
        model(ROW).sum().backward()
        optimizer.step()

    trace = traced(model, run=run)

    assert names(trace) == ["linear", "sum"]
    assert [written for _, written in trace.steps] == [frozenset({"weight", "bias"})]


def test_a_closure_is_recorded_and_the_step_around_it_is_not():
    """Forward and backward inside of `step(closure)` are seen."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure():
        loss = model(ROW).sum()
        loss.backward()
        return loss

    assert names(traced(model, run=lambda: optimizer.step(closure))) == ["linear", "sum"]


def test_the_module_of_a_place_is_the_innermost_of_the_users_own():
    """An operation inside `nn.Linear` belongs to the module whose forward called it."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x):
            return self.lin(x)

    model = nn.Sequential(Inner(), nn.Linear(2, 1))

    trace = traced(model, run=lambda: model(ROW))

    assert [op.module for op in trace.ops] == ["0", ""]
    assert trace.modules_run == {"", "0", "0.lin", "1"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the fast path's own
def test_a_fast_path_of_eval_mode_is_one_operation_with_the_same_bits():
    """A padded encoder in eval mode runs without the mode and gives the same numbers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    seen = []

    def run():
        with torch.no_grad():
            seen.append(model(x, src_key_padding_mask=pad))

    run()
    trace = traced(model, run=run)

    assert torch.equal(*seen)
    assert names(trace) == ["forward"]


def test_a_mode_of_the_users_own_is_not_popped():
    """The trace leaves modes that lie on its own where they are."""

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Counting.calls += 1
            return func(*args, **(kwargs or {}))

    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    def run():
        with Counting(), torch.no_grad():
            model(torch.ones(1, 3, 8))

    traced(model, run=run)

    assert Counting.calls > 5


def test_no_tensor_is_kept_alive():
    """A tensor that the user's program drops is gone while the trace still runs."""
    model = nn.Linear(2, 2)
    trace = Trace(dict(model.named_parameters()), dict(model.named_modules()))
    trace.start()
    h = model(ROW)
    kept, made = weakref.ref(h), h.exp()
    del h, made
    gone = kept() is None
    trace.stop()

    assert gone


def test_nothing_refers_to_the_trace_after_it_stopped():
    """A stopped trace can be collected: no mode, hook or cycle through torch holds it."""
    model = nn.Linear(2, 1)
    trace = traced(model, run=lambda: model(ROW).sum().backward())
    ref = weakref.ref(trace)
    del trace
    gc.collect()

    assert ref() is None


def test_a_failure_of_ours_ends_the_trace_and_not_the_program(monkeypatch, caplog):
    """When the bookkeeping fails, the user's call still returns, and one record says so."""
    model = nn.Linear(2, 1)
    monkeypatch.setattr(Trace, "_finish_simple", lambda *_: 1 / 0)

    trace = traced(model, run=lambda: model(ROW).sum())

    assert isinstance(trace.broken, ZeroDivisionError)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("wrapper", "run"),
    [
        (Wrapper.SAMPLE, lambda w: torch.distributions.Normal(w, 1.0).sample()),
        (Wrapper.DEEPCOPY_TENSOR, lambda w: __import__("copy").deepcopy(w)),
        (Wrapper.DEEPCOPY, lambda w: __import__("copy").deepcopy([w])),
    ],
)
def test_a_call_that_owns_what_runs_inside_is_recognised(wrapper, run):
    """Operations inside of `sample()` and `deepcopy()` belong to these calls."""
    model = nn.Linear(2, 1)

    trace = traced(model, run=lambda: run(model.weight))

    assert wrapper in {op.wrapper for op in trace.ops}


def test_gradients_switched_off_by_the_user_are_not_blamed_on_a_call_inside():
    """Under the user's own `no_grad`, a sample inside is no cause of its own."""
    model = nn.Linear(2, 1)

    def run():
        with torch.no_grad():
            torch.distributions.Normal(model.weight, 1.0).sample()

    assert {op.wrapper for op in traced(model, run=run).ops} == {None}


def test_functions_have_the_names_that_users_write():
    """Public names are those of the documentation."""
    data = vars(torch._C.TensorBase)["data"].__get__
    functions = [torch.Tensor.detach, data, torch.relu, torch.autograd.grad]

    assert [public_name(function) for function in functions] == [
        "torch.Tensor.detach",
        "torch.Tensor.data",
        "torch.relu",
        "torch.autograd.grad",
    ]


def test_a_write_is_known_by_its_name():
    """In-place methods, operators and item assignment write; others do not."""
    writing = [torch.Tensor.add_, torch.Tensor.__setitem__, torch.Tensor.__iadd__]
    reading = [torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.requires_grad_]

    assert [traits_of(f).writes for f in writing + reading] == [True] * 3 + [False] * 3


def test_many_writes_beside_a_live_view_stay_cheap():
    """Each write gives each live alias one new value, however many writes there were before."""
    model = nn.Linear(2, 2)

    def run():
        buffer = torch.zeros(64, 2)
        flat = buffer.view(-1)
        for row in range(60):
            buffer[row] = model(ROW)[0]
        flat.sum()

    trace = traced(model, run=run)

    writes = [op for op in trace.ops if op.kept]
    assert [len(op.outputs) for op in writes] == [2] * 60


def test_a_broken_trace_still_tells_who_got_a_gradient(monkeypatch):
    """After a failure of ours nothing is called missing that has a gradient."""
    monkeypatch.setattr(Trace, "_finish_simple", lambda *_: 1 / 0)
    model = nn.Linear(2, 1)

    with diagnose(model) as diagnosis:
        model(ROW).sum().backward()

    assert list(diagnosis.report.statuses.values()) == [Status.OK] * 2
    assert diagnosis.report.diagnoses == ()


def test_after_a_broken_trace_no_result_is_called_dropped(monkeypatch):
    """What was read before a failure of ours may have gone on unseen: the cause stays open."""
    model = nn.ModuleDict({"kept": nn.Linear(2, 2), "cut": nn.Linear(2, 2)})

    with diagnose(model) as diagnosis:
        h = model["cut"](ROW)
        monkeypatch.setattr(Trace, "_finish_simple", lambda *_: 1 / 0)
        (model["kept"](ROW) + h.detach()).sum().backward()

    (found,) = diagnosis.report.diagnoses
    assert (found.cause, found.parameters) == (Cause.UNDETERMINED, ("cut.weight", "cut.bias"))


def rows_kept(model, x):
    h = model(x)
    kept = list(h)
    h += 1
    return h.sum() + 0 * len(kept)


def chunks_kept(model, x):
    h = model(x)
    kept = h.chunk(2, 1)
    return torch.nn.functional.relu_(h).sum() + 0 * len(kept)


def part_of_a_weight(model, x):
    with torch.no_grad():
        model.weight[0].fill_(0.5)
        model.weight.view(-1).clamp_(-1, 1)
        model.weight.T.copy_(model.weight.T.clone())
    return model(x).sum()


def view_without_gradient(model, x):
    h = model(x)
    with torch.no_grad():
        kept = h[0]
    h.mul_(2)
    return h.sum() + 0 * len(kept)


def padded_embedding(model, x):
    table = nn.Embedding(3, 2, padding_idx=0)
    return model(table(torch.tensor([0, 1]))).sum() + 0 * x.sum()


@pytest.mark.parametrize(
    "program", [rows_kept, chunks_kept, part_of_a_weight, view_without_gradient, padded_embedding]
)
def test_views_that_torch_has_given_up_break_no_trace(program, caplog):
    """A view whose history torch refuses to tell is followed no further, and the trace goes on."""
    model = nn.Linear(2, 2)
    with diagnose(model) as healthy:
        program(model, torch.ones(2, 2)).backward()
    cut = nn.ModuleDict({"kept": nn.Linear(2, 2), "cut": nn.Linear(2, 2)})
    with diagnose(cut) as sick:
        lost = cut["cut"](torch.ones(2, 2)).detach()  # <- here
        (program(cut["kept"], torch.ones(2, 2)) + lost.sum()).backward()

    assert (healthy.report.diagnoses, caplog.records) == ((), [])
    (diagnosis,) = sick.report.diagnoses
    assert (diagnosis.cause, diagnosis.parameters) == (Cause.DETACHED, ("cut.weight", "cut.bias"))
    assert diagnosis.site.source.strip().endswith("# <- here")


def test_tensors_over_one_memory_are_let_go_when_they_died():
    """Views that come and go over one tensor do not pile up in a trace."""
    h = torch.ones(100)
    trace = Trace({}, {})
    trace.start()
    views = [h[i] for i in range(100)]
    with trace.paused():
        several = len(trace._sharing(h))
    del views
    last = h[0]
    trace.leave()

    assert (several, len(trace._sharing(last))) == (101, 2)
    trace.stop()
