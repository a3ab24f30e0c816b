from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch._sensor import Sensor
from gradwatch._stats import is_lazy, measure
from tests.conftest import Kernels

TO_HOST = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__float__, Tensor.__bool__}


class Copies(TorchFunctionMode):
    """Count the calls that bring a tensor's values to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in TO_HOST
        return func(*args, **(kwargs or {}))


class Swallow(torch.autograd.Function):
    """Read a weight in forward, and return no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x + 0 * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def leaves(*names: str) -> dict[str, nn.Parameter]:
    """Return parameters of two ones."""
    return {name: nn.Parameter(torch.ones(2)) for name in names}


def with_stale_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters, each with a gradient that an earlier step left."""
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    return parameters


def sensed(sensor: Sensor, loss: Tensor, **options: Any) -> frozenset[str]:
    """Run one backward pass under the sensor, and return what has arrived so far."""
    sensor.before()
    loss.backward(**options)
    sensor.after()
    return sensor.arrived


# ---- Sensor


def test_gradients_that_a_backward_gave_have_arrived():
    """A parameter that the loss reaches has arrived, and one that it does not reach is missing."""
    ps = leaves("used", "unused")
    sensor = Sensor(ps)

    assert sensed(sensor, ps["used"].sum()) == {"used"}
    assert sensor.missing() == ["unused"]


def test_stale_gradients_are_missing():
    """A gradient left from an earlier step counts for nothing, and neither does a Function's None."""
    ps = with_stale_gradients(leaves("used", "unused", "none"))
    sensor = Sensor(ps)

    arrived = sensed(sensor, Swallow.apply(ps["used"] * 2, ps["none"]).sum())

    assert arrived == {"used"}
    assert sensor.missing() == ["unused", "none"]
    assert all(parameter.grad is not None for parameter in ps.values())


def test_zeros_left_between_backwards_are_missing():
    """Zeros that ``zero_grad(set_to_none=False)`` left are no gradient of the next backward."""
    ps = leaves("a", "b")
    sensor = Sensor(ps)
    sensed(sensor, ps["a"].sum() + ps["b"].sum())
    sensor.restart(sensor.names)
    torch.optim.SGD(ps.values(), 0.1).zero_grad(set_to_none=False)

    sensed(sensor, ps["a"].sum())

    assert sensor.missing() == ["b"]


def test_accumulated_backwards_count_together():
    """What arrived in any backward of a step has arrived in the step."""
    ps = leaves("a", "b", "c")
    sensor = Sensor(ps)

    sensed(sensor, ps["a"].sum())
    sensed(sensor, ps["b"].sum())

    assert sensor.arrived == {"a", "b"}
    assert sensor.latest == {"b"}
    assert sensor.missing() == ["c"]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_accumulates_out_of_place_and_arrives():
    """A gradient that ``create_graph`` accumulates into a new tensor of version 0 has arrived."""
    ps = leaves("a", "b")
    sensor = Sensor(ps)
    sensed(sensor, ps["a"].pow(2).sum() + ps["b"].pow(2).sum(), create_graph=True)
    sensor.restart(sensor.names)

    arrived = sensed(sensor, ps["a"].pow(2).sum(), create_graph=True)

    assert arrived == {"a"}
    assert ps["a"].grad is not None
    assert ps["a"].grad._version == 0
    for parameter in ps.values():
        parameter.grad = None  # it holds the graph that holds it


def test_a_gradient_emptied_after_it_arrived_is_missing():
    """A gradient that arrived and is gone again is missing when the step is judged."""
    ps = leaves("a")
    sensor = Sensor(ps)
    sensed(sensor, ps["a"].sum())

    ps["a"].grad = None

    assert sensor.missing() == ["a"]


def test_gradients_taken_by_autograd_grad_have_not_arrived():
    """``torch.autograd.grad`` fills no ``.grad``, so nothing arrives."""
    ps = leaves("a")
    sensor = Sensor(ps)
    sensor.before()
    torch.autograd.grad(ps["a"].sum(), ps["a"])
    sensor.after()

    assert sensor.arrived == frozenset()


def test_frozen_parameters_are_not_missing():
    """A parameter that wants no gradient is not missing."""
    ps = leaves("a", "frozen")
    ps["frozen"].requires_grad_(False)

    assert Sensor(ps).missing() == ["a"]


def test_sensor_keeps_no_gradient_alive():
    """Between ``before()`` and ``after()`` a gradient that the user drops is gone at once."""
    ps = with_stale_gradients(leaves("a"))
    sensor = Sensor(ps)
    assert ps["a"].grad is not None
    gradient = weakref.ref(ps["a"].grad)
    sensor.before()

    ps["a"].grad = None

    assert gradient() is None


def steady(sensor, parameters):
    """Run steps that replace every gradient, until the sensor looks at a few of them alone."""
    for _ in range(5):
        in_a_step(sensor, parameters, {name: torch.ones(1) for name in parameters})


def in_a_step(sensor, parameters, gradients, *, whole=False):
    """Run a step after which these gradients are there; return who is missing."""
    sensor.before(whole=whole)
    for name, parameter in parameters.items():
        parameter.grad = gradients.get(name)
    sensor.after()
    missing = sensor.missing()
    sensor.judged(tuple(parameters), again=False)
    sensor.settle(tuple(parameters))
    return missing


def test_in_a_loop_that_replaces_gradients_one_that_is_none_is_missing_at_once():
    """Where a few old gradients are looked at in place of all, each step still tells who has none."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    steady(sensor, parameters)

    fresh = {name: torch.ones(1) for name in parameters if name != "p17"}
    assert in_a_step(sensor, parameters, fresh) == ["p17"]
    assert in_a_step(sensor, parameters, {n: torch.ones(1) for n in parameters}) == []


def test_a_loop_that_ceases_to_empty_its_gradients_is_seen_through_a_few_of_them():
    """When old gradients stay, the few show it, and from the next step on all are told."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    steady(sensor, parameters)

    def kept():
        return {name: parameter.grad for name, parameter in parameters.items()}

    assert in_a_step(sensor, parameters, kept()) == []
    assert in_a_step(sensor, parameters, kept()) == list(parameters)


def test_one_old_gradient_among_new_ones_is_seen_in_a_whole_look():
    """A single gradient that is not emptied any more is told in the tenth step that is logged, and from then on."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    steady(sensor, parameters)

    def all_but_one():
        fresh = {name: torch.ones(1) for name in parameters}
        return fresh | {"p17": parameters["p17"].grad}

    found = [in_a_step(sensor, parameters, all_but_one(), whole=True) for _ in range(12)]
    assert found[-1] == found[-2] == ["p17"]
    first = found.index(["p17"])
    assert found == [[]] * first + [["p17"]] * (12 - first)
    assert first < 10


def written_over(parameters, names):
    """Return the gradients after ``zero_grad(set_to_none=False)``, and a backward that reaches these."""
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros(1)
        parameter.grad.zero_()
        if name in names:
            parameter.grad.add_(1)
    return {name: parameter.grad for name, parameter in parameters.items()}


def in_an_overwriting_step(sensor, parameters, names, *, whole=False):
    """Run a step that writes over all gradients; return who is missing, and who was written less often."""
    sensor.before(whole=whole)
    written_over(parameters, names)
    sensor.after()
    told = sensor.missing(), sensor.lagging
    sensor.judged(tuple(parameters), again=False)
    sensor.settle(tuple(parameters))
    return told


@pytest.mark.parametrize("whole", [False, True])
def test_in_a_loop_that_writes_over_its_gradients_one_left_at_zero_is_told(whole):
    """Where versions are compared in place of objects, what backward leaves out was written less often."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    found = [in_an_overwriting_step(sensor, parameters, parameters, whole=whole) for _ in range(6)]
    assert found[-1] == ([], frozenset())

    some = parameters.keys() - {"p17"}
    assert in_an_overwriting_step(sensor, parameters, some, whole=whole) == ([], {("p17", 1)})
    assert in_an_overwriting_step(sensor, parameters, some, whole=whole) == ([], {("p17", 1)})
    assert in_an_overwriting_step(sensor, parameters, parameters, whole=whole) == ([], frozenset())


def test_in_a_loop_that_wrote_over_its_gradients_others_are_told():
    """Gradients that are emptied, kept, or replaced in such a loop are what they are."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    for _ in range(6):
        in_an_overwriting_step(sensor, parameters, parameters)

    kept = {name: parameter.grad for name, parameter in parameters.items()}
    assert in_a_step(sensor, parameters, kept) == list(parameters)
    fresh = {name: torch.ones(1) for name in parameters}
    assert in_a_step(sensor, parameters, fresh) == []
    assert in_a_step(sensor, parameters, fresh | {"p17": None}) == list(parameters)


def test_a_gradient_that_was_emptied_comes_as_a_new_one():
    """In a loop that writes over its gradients one that was emptied by hand, and comes again, is not missing."""
    parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
    sensor = Sensor(parameters)
    for _ in range(6):
        in_an_overwriting_step(sensor, parameters, parameters)

    parameters["p17"].grad = None
    fresh = {name: parameter.grad for name, parameter in parameters.items()}
    sensor.before(whole=False)
    for name, gradient in fresh.items():
        if gradient is not None:
            gradient.zero_().add_(1)
        parameters[name].grad = torch.ones(1) if gradient is None else gradient
    sensor.after()

    assert sensor.missing() == []


def test_of_two_steps_before_the_next_batch_the_second_is_not_missing():
    """Where a loop that has stepped once in each batch steps twice, what is there counts as arrived."""
    for gradients in (None, torch.zeros):
        parameters = {f"p{n}": nn.Parameter(torch.ones(1)) for n in range(100)}
        sensor = Sensor(parameters)
        for _ in range(6):
            if gradients is None:
                in_a_step(sensor, parameters, {name: torch.ones(1) for name in parameters})
            else:
                in_an_overwriting_step(sensor, parameters, parameters)
        for _ in range(6):
            sensor.before(whole=False)
            for again in (False, True):
                for parameter in parameters.values():
                    parameter.grad = torch.ones(1)
                sensor.after()
                assert sensor.missing() == []
                sensor.judged(tuple(parameters), again=again)
            sensor.settle(tuple(parameters))


def test_after_without_before_changes_nothing():
    """An end of a backward whose beginning was not seen says nothing."""
    ps = with_stale_gradients(leaves("a"))
    sensor = Sensor(ps)
    sensor.after()

    assert sensor.missing() == ["a"]


def test_gradients_made_in_inference_mode_are_sensed():
    """Stale gradients without a version counter are told from new ones by identity."""
    ps = leaves("a", "b")
    with torch.inference_mode():
        with_stale_gradients(ps)
    sensor = Sensor(ps)
    sensor.before()
    ps["a"].grad = torch.ones(2)
    sensor.after()

    assert sensor.missing() == ["b"]


def test_parameters_made_in_inference_mode_do_not_disturb():
    """Parameters that keep no version are watched like any others."""
    with torch.inference_mode():
        layer = nn.Linear(2, 1)
    sensor = Sensor(dict(layer.named_parameters()))

    sensed(sensor, layer(torch.ones(1, 2)).sum())

    assert sensor.arrived == {
        name for name, parameter in layer.named_parameters() if parameter.grad is not None
    }


def test_restart_forgets_the_parameters_of_one_optimizer():
    """A new step of one optimizer leaves what arrived for another's parameters."""
    ps = leaves("a", "b")
    sensor = Sensor(ps)
    sensed(sensor, ps["a"].sum() + ps["b"].sum())

    sensor.restart(["a"])

    assert sensor.missing() == ["a"]


def test_watches_compares_names_and_objects():
    """A sensor watches a model again only under the same names and with the same objects."""
    ps = leaves("a", "b")
    sensor = Sensor(ps)

    assert sensor.watches(ps)
    assert not sensor.watches({"a": ps["a"]})
    assert not sensor.watches({"a": ps["a"], "c": ps["b"]})
    assert not sensor.watches(leaves("a", "b"))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_known():
    """A parameter is lazy until its module has seen an input."""
    layer = nn.LazyLinear(1)
    before = is_lazy(layer.weight)
    layer(torch.ones(1, 2))

    assert (before, is_lazy(layer.weight)) == (True, False)


# ---- measure


def norm_of(gradient: Tensor) -> float:
    """Return the norm that is measured of one gradient."""
    return measure({"g": gradient}).norms["g"]


@pytest.mark.parametrize(
    ("gradient", "norm"),
    [
        (torch.tensor([3.0, 4.0]), 5.0),
        (torch.full((100_000,), 300.0, dtype=torch.float16), 300.0 * math.sqrt(1e5)),
        (torch.full((4096,), 2.0, dtype=torch.bfloat16), 128.0),
        (torch.full((4,), 2.0, dtype=torch.float64), 4.0),
        (torch.full((4,), 1e300, dtype=torch.float64), 2e300),
        (torch.full((4,), 1e-300j, dtype=torch.complex128), 2e-300),
        (torch.tensor([3 + 4j, 0j]), 5.0),
        (torch.tensor([3 + 4j], dtype=torch.complex128), 5.0),
        (torch.full((4,), 1e30), 2e30),
        (torch.full((4,), 1e-30), 2e-30),
        (torch.tensor(-2.0), 2.0),
        (torch.tensor([[3.0], [4.0]]).t(), 5.0),
        (torch.empty(0), 0.0),
        (torch.zeros(3), 0.0),
    ],
    ids=[
        "float32",
        "half overflow",
        "bfloat16",
        "float64",
        "float64 overflow of squares",
        "complex128 underflow of squares",
        "complex64",
        "complex128",
        "float32 overflow of squares",
        "float32 underflow of squares",
        "no dimension",
        "not contiguous",
        "empty",
        "zeros",
    ],
)
def test_norm_is_right_for_every_dtype(gradient: Tensor, norm: float):
    """The norm is that of the exact sum of squares, whatever the dtype of the gradient."""
    assert norm_of(gradient) == pytest.approx(norm, rel=1e-4)  # float32 sums


def test_sparse_gradients_are_summed_before_they_are_measured():
    """Entries of the same place in an uncoalesced sparse gradient count as their sum."""
    twice = torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.tensor([1.0, 1.0]), (3,), check_invariants=True
    )

    assert norm_of(twice) == 2.0
    assert norm_of(twice.coalesce()) == 2.0


def test_sparse_gradient_of_an_embedding_is_measured():
    """The gradient of ``nn.Embedding(sparse=True)`` has the norm of the dense one."""
    layer = nn.Embedding(5, 2, sparse=True)
    layer(torch.tensor([1, 1, 3])).sum().backward()
    gradient = layer.weight.grad

    assert gradient is not None
    assert gradient.is_sparse
    assert norm_of(gradient) == pytest.approx(gradient.to_dense().norm().item())


def test_csr_gradients_are_measured():
    """Other sparse layouts are measured as the dense tensor they stand for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that CSR is in beta
        gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to_sparse_csr()

    assert norm_of(gradient) == 5.0


def test_mixed_dtypes_are_measured_together():
    """Gradients of several dtypes are measured in one call, in the order in which they came."""
    stats = measure(
        {
            "half": torch.full((4,), 1.0, dtype=torch.float16),
            "double": torch.full((4,), 2.0, dtype=torch.float64),
            "single": torch.full((4,), 3.0),
            "complex": torch.full((4,), 4j),
            "empty": torch.empty(0, dtype=torch.bfloat16),
        }
    )

    assert stats.norms == {"half": 2.0, "double": 4.0, "single": 6.0, "complex": 8.0, "empty": 0.0}
    assert stats.total == pytest.approx(math.sqrt(4 + 16 + 36 + 64))
    assert (stats.zero, stats.nonfinite) == (frozenset(), frozenset())


def test_zeros_and_what_is_not_finite_are_told_apart():
    """Zero means all elements, not finite means any; a tiny, a huge and an empty one are neither."""
    stats = measure(
        {
            "zeros": torch.zeros(2),
            "negative zeros": -torch.zeros(2),
            "tiny": torch.full((2,), 1e-40),
            "huge": torch.full((2,), 3e38),
            "half": torch.full((2,), 6e4, dtype=torch.float16),
            "nan": torch.tensor([1.0, math.nan]),
            "inf": torch.tensor([-math.inf, 0.0]),
            "empty": torch.empty(0),
            "double zeros": torch.zeros(2, dtype=torch.float64),
            "double nan": torch.tensor([1e300, math.nan], dtype=torch.float64),
            "double inf": torch.tensor([math.inf, 1.0], dtype=torch.float64),
            "nothing stored": torch.sparse_coo_tensor(
                torch.empty(1, 0), torch.empty(0, dtype=torch.float64), (3,), check_invariants=True
            ),
        }
    )

    assert stats.zero == {"zeros", "negative zeros", "double zeros", "nothing stored"}
    assert stats.nonfinite == {"nan", "inf", "double nan", "double inf"}
    assert math.isnan(stats.norms["nan"])
    assert stats.norms["inf"] == math.inf


def test_scale_is_taken_out_of_norms():
    """Norms are divided by the scale that the loss was multiplied with."""
    stats = measure(
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, scales={"a": 0.5, "b": 0.5}
    )

    assert (stats.norms, stats.total) == ({"a": 6.0, "b": 8.0}, 10.0)


def test_nothing_is_measured_as_nothing():
    """Without any gradient the statistics are empty, and the total is 0."""
    stats = measure({})

    assert (stats.norms, stats.total) == ({}, 0.0)


def test_a_thousand_gradients_take_one_kernel_and_one_copy():
    """A thousand gradients are measured by one fused kernel and one copy to the host."""
    gradients = {f"layer{i}.weight": torch.full((3,), i + 1.0) for i in range(1000)}
    with Copies() as copies, Kernels() as kernels:
        stats = measure(gradients)

    assert stats.norms["layer999.weight"] == pytest.approx(1000.0 * math.sqrt(3))
    assert kernels.counts["_foreach_norm"] == 1
    assert copies.count + kernels.counts["_local_scalar_dense"] == 1
    assert set(kernels.counts) <= {"_foreach_norm", "stack", "cat", "detach"}


SHAPES: list[tuple[int, ...]] = [(), (5,), (3, 4), (0,), (2, 1, 3), (64,)]


def crowd(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Return as many small parameters as are measured in one tensor."""
    torch.manual_seed(0)
    shapes = SHAPES * 20
    return {
        f"layer{i}.weight": nn.Parameter(torch.randn(shape, dtype=dtype))
        for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_many_small_gradients_are_measured_in_one_tensor(dtype: torch.dtype):
    """Their norms are those of each one alone, of every type and shape, and no gradient is changed."""
    alike = Sensor(crowd(dtype)).alike
    gradients = {name: p.detach() * 3 for name, p in crowd(dtype).items()}
    gradients["layer1.weight"].zero_()
    gradients["layer7.weight"][2] = math.nan
    gradients["layer13.weight"][2] = -math.inf
    gradients["layer19.weight"].fill_(torch.finfo(dtype).tiny)
    gradients["layer25.weight"].fill_(torch.finfo(dtype).max)
    before = {name: gradient.clone() for name, gradient in gradients.items()}

    with Kernels() as kernels, Copies() as copies:
        stats = measure(gradients, alike=alike)
    alone = {name: measure({name: gradient}) for name, gradient in gradients.items()}

    # Those in doubt, four or five of a hundred and twenty, are measured once more.
    assert kernels.counts["segment_reduce"] == 1
    assert copies.count + kernels.counts["_local_scalar_dense"] == 2
    assert stats.norms.keys() == gradients.keys()
    for name, norm in stats.norms.items():
        assert norm == pytest.approx(alone[name].norms[name], rel=1e-6, nan_ok=True)
    assert stats.zero == {name for name, each in alone.items() if each.zero}
    assert stats.nonfinite == {name for name, each in alone.items() if each.nonfinite}
    assert all(
        torch.equal(gradient.nan_to_num(), before[name].nan_to_num())
        for name, gradient in gradients.items()
    )


def test_few_or_large_gradients_are_measured_as_they_are():
    """One that is missing, a sparse one, large ones and lazy ones leave the others to the fused kernel."""
    parameters = crowd()
    alike = Sensor(parameters).alike
    gradients: dict[str, torch.Tensor] = {name: p.detach() for name, p in parameters.items()}
    some = dict(list(gradients.items())[1:])
    with Kernels() as kernels:
        norms = measure(some, alike=alike).norms
    assert (kernels.counts["_foreach_norm"], kernels.counts["segment_reduce"]) == (1, 0)
    assert norms["layer7.weight"] == pytest.approx(gradients["layer7.weight"].norm().item())

    sparse = gradients | {"layer1.weight": torch.ones(5).to_sparse()}
    assert measure(sparse, alike=alike).norms["layer1.weight"] == pytest.approx(math.sqrt(5))
    large = [nn.Parameter(torch.ones(1000)) for _ in range(100)]
    assert Sensor({str(i): p for i, p in enumerate(large)}).alike == (torch.float32, None)
    assert Sensor({"lazy": nn.LazyLinear(2).weight}).alike is None


def test_norms_are_right_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch):
    """A torch without the fused kernel gives the same norms, one call each."""
    monkeypatch.delattr(torch, "_foreach_norm")

    stats = measure({"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "c": torch.tensor([2j])})

    assert stats.norms == {"a": 5.0, "b": 0.0, "c": 2.0}
    assert stats.zero == {"b"}


def test_measuring_changes_no_gradient():
    """A gradient that is part of a graph is measured without a new node, and is as it was."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    gradient = weight * 1.0
    measure({"weight": gradient})

    assert gradient._version == 0
    assert gradient.tolist() == [3.0, 4.0]
    assert gradient.grad_fn is not None
