"""The wording of notes on errors: the fact at the root of each, and the way out.

Beside ``_words``, this room holds what is said where the user's own code raises, so that it can be read
and mended in one place. Facts come in as values; nothing is looked up here. Standard library alone.
"""

from __future__ import annotations

ERRORS = {
    "ddp": (
        "DDP waits for a gradient of every parameter, and some got none in an earlier step",
        "mend what follows, or pass `find_unused_parameters=True`",
    ),
    "untraced": (
        "this step was not traced, so that the line at the root is not known",
        "run the step inside of `with gradwatch.diagnose(model):` to find it",
    ),
    "no_parameters": (
        "the model has no parameters, so the loss has no history",
        "assign layers to attributes of the module: a plain list or dictionary does not register them",
    ),
    "all_frozen": (
        "every parameter has `requires_grad=False`, so the loss has no history",
        "leave `requires_grad` on for what should train, or let the input require grad if its gradient is wanted",
    ),
    "left_off": (
        "gradient mode was switched off, and is off still",
        "switch it off with `with torch.no_grad():`, which switches it on again whatever happens",
    ),
    "off_in_hook": (
        "gradients are off in what a hook runs while backward does",
        "compute it under `with torch.enable_grad():`, or call the outer `backward` with `create_graph=True`",
    ),
    "one_without_history": (
        "of the tensors that backward begins at, this one has no history",
        "leave out those for which `tensor.requires_grad` is False",
    ),
    "twice_in_checkpoint": (
        "what a reentrant checkpoint runs again goes back into what it uses without being handed it, each time",
        "pass `use_reentrant=False`, or hand it in as an argument of `checkpoint`",
    ),
    "closure_with_scaler": (
        "a closure is handed to the step of a GradScaler, which takes none",
        "call `optimizer.step(closure)` itself, with the loss scaled and unscaled inside of the closure, or leave it out",
    ),
    "dense_gradient": (
        "SparseAdam is given a gradient that is not sparse: {1} is used here other than by a look-up",
        "use only the rows that are looked up, or give it to another optimizer",
    ),
    "integer_data": (
        "a parameter that requires grad is given data of integers here",
        "keep rounded values in floating point, `x.round()`, or in a buffer beside the parameter",
    ),
    "captured_in_place": (
        "a function that is transformed changes a tensor of the outside in place here",
        "write `x = x + y` in place of `x += y`, or hand the tensor in and return it",
    ),
    "functional_in_transform": (
        "`requires_grad_()`, which `torch.autograd.functional` calls too, is of no use inside of `vmap` and the like",
        "use `torch.func`, whose `grad`, `vjp`, `jacrev`, `jacfwd` and `hessian` go together with `vmap`",
    ),
    "overlapping": (
        "what is written and what is read here are one memory: a tensor, and a view of it",
        "write `x = x + y` in place of `x += y`, or `.clone()` what is read",
    ),
    "leaf_filled": (
        "a tensor that was made to require grad is written into",
        "make it without `requires_grad=True`: what is written into it gives it a history",
    ),
    "other_data": (
        "a parameter is given data of another shape, and what was made for the old one expects that",
        "put a new parameter in its place, `layer.weight = nn.Parameter(...)`, and make what holds the old one anew",
    ),
    "ill_defined": (
        "the loss depends on what an eigenvector or singular vector leaves open: its phase",
        "use what does not change with the phase: `.abs()`, projections `v @ v.mH`, or the values alone",
    ),
    "no_history": ("no parameter that requires grad reaches the loss", None),
    "overwritten": (
        "`{1}` changes a tensor in place here that a backward needs as it was",
        "{2}, or change it after the backward pass",
    ),
    "overwritten_result": (
        "`{1}` changes in place here what `{3}` made, and a backward needs it as it was",
        "{2}",
    ),
    "renormed": (
        "`max_norm` makes this call change the table in place, and an earlier operation needs it as it was",
        "look everything up in one call, or give the earlier operation `weight.clone()`",
    ),
    "view_without_history": (
        "a view that was made under `torch.no_grad()` is changed in place where gradients are on",
        "make the view where gradients are on, or `.clone()` it",
    ),
    "cut_before": (
        "a gradient is asked for {2} the output was not computed from: `{1}` cuts it off here",
        "take the gradient with respect to the tensor that goes into the output",
    ),
    "not_wanting": (
        "a gradient is asked of, or for, a tensor that does not require grad",
        "call `.requires_grad_()` on the input before it is used, and look for a `detach` or `no_grad` on the way",
    ),
    "flag_of_a_result": (
        "`requires_grad` is switched off for the result of an operation, which only leaves allow",
        "write `x = x.detach()`",
    ),
    "flag_set_on_a_result": (
        "`requires_grad` is set on the result of an operation that has a history: only leaves have that flag",
        "start from a leaf: `x = x.detach().requires_grad_()`, or call `x.retain_grad()` for its `.grad`",
    ),
    "hook": (
        "a hook that is registered here returns a gradient of another shape or type than it was given",
        "return a gradient like the one that came, or None to leave it as it is",
    ),
    "hook_returns": (
        "a hook returns a gradient of another shape or type than it was given",
        "return a gradient like the one that came, or None to leave it as it is",
    ),
    "recomputed": (
        "what runs inside of this checkpoint does something else when backward runs it again",
        "let it depend on its arguments alone: no counter, no random number of Python's or of a generator of its own, no state that it changes",
    ),
    "detach_of_a_view": (
        "a view of another tensor cannot be detached in place",
        "write `x = x.detach()` in place of `x.detach_()`",
    ),
    "nothing_registered": (
        "the module registers no parameter: {1}",
        "{2}",
    ),
    "no_parameter_made": (
        "the module registers no parameter: `{1}` is the result of an operation, which is none",
        "make the parameter last: `self.weight = nn.Parameter(...)` around all that is computed",
    ),
    "used_up": (
        "the optimizer is given an iterator that was read to its end before",
        "make it a list, which can be read again: `params = list(...)`",
    ),
    "nothing_wanting": (
        "the optimizer is given no parameter: all of them have `requires_grad=False`",
        "leave `requires_grad` on for what should train",
    ),
    "no_leaf": (
        "an optimizer is given the result of this operation, which is no leaf",
        "make it a leaf: `x = (...).detach().requires_grad_()`, or call `requires_grad_()` last",
    ),
    "no_parameter": (
        "the result of an operation is assigned to the name of a parameter",
        "change the parameter's values, `with torch.no_grad(): weight.copy_(...)`, or keep the result under a name of its own",
    ),
    "registered_tensor": (
        "a tensor that is no parameter is registered as one",
        "wrap it: `nn.Parameter(tensor)`, or use `register_buffer` for what does not train",
    ),
    "grad_of_a_result": (
        "`.grad` is None here: it is kept for leaves, and this is the result of an operation",
        "call `.retain_grad()` before the backward pass, or make it a leaf: `x = x.detach().requires_grad_()`",
    ),
    "grad_of_a_copy": (
        "`.grad` is read of a detached copy of a parameter, which has none: it was taken here",
        "read it of the parameter itself: `model.named_parameters()` in place of `state_dict()`",
    ),
    "grad_is_none": (
        "`.grad` of a parameter is None here: no gradient came to it",
        "leave out those without one: `if p.grad is not None`, or mend what follows",
    ),
    "number": (
        "the loss is a number: it left torch here, and has no `backward`",
        "add up the tensors themselves, and take `.item()` for the log only",
    ),
    "grad_of_another_type": (
        "a gradient of another type than the parameter is assigned",
        "cast it first: `p.grad = gradient.to(p.dtype)`",
    ),
    "not_finite": (
        "the gradients that are to be clipped here are NaN or infinite",
        None,
    ),
    "asked_for_nothing": (
        "no tensor is named to differentiate for",
        "name at least one that requires grad, or leave `inputs` out of `backward()`",
    ),
    "not_parameters": (
        "the optimizer is given something that is no parameter",
        "pass `model.parameters()` itself, or groups: `[{{'params': model.head.parameters()}}]`",
    ),
    "in_two_groups": (
        "{1} would be in two groups of the optimizer",
        "leave out of the one group what the other one holds",
    ),
    "resized": (
        "a tensor that requires grad is resized in place",
        "use what `reshape`, a slice, or `torch.nn.functional.pad` returns",
    ),
    "stepped_before": (
        "the optimizer has already stepped with these gradients, and `scaler.update()` was not called since",
        "call `unscale_()`, `step()` and `update()` in this order, and each once for a step",
    ),
    "unscaled_twice": (
        "gradients are unscaled here for the second time since `scaler.update()`",
        "call `unscale_()` once for each step of the optimizer: in the micro-batch in which it steps",
    ),
    "half_parameters": (
        "the parameters are in float16, and a GradScaler is for parameters in float32",
        "keep the model in float32 and run it under `torch.autocast`, or do without the scaler",
    ),
    "some_in_half": (
        "`{1}` is in float16, and a GradScaler is for parameters in float32",
        "make it in float32, as the others are, and run the model under `torch.autocast`",
    ),
    "nothing_to_unscale": (
        "no parameter of the optimizer that steps here has got a gradient",
        None,
    ),
    "held_before": (
        "the optimizer holds parameters that the model does not have any more: they were replaced here",
        "build the optimizer after the model is complete",
    ),
    "sparse": (
        "sparse gradients are given to what is for dense ones",
        "leave out `sparse=True`, or give these parameters to `torch.optim.SparseAdam`",
    ),
    "serialised": (
        "a tensor with a history is sent to another process",
        "`.detach()` it before it is sent",
    ),
    "grad_of_another_size": (
        "a gradient of another size than the parameter is assigned",
        "give it the shape of the parameter: `p.grad = piece.view_as(p)`",
    ),
    "cat_of_scalars": (
        "tensors with 0 dimensions, such as losses, are concatenated",
        "use `torch.stack`, which gives them a dimension",
    ),
    "expanded_in_place": (
        "a tensor whose elements share memory, as those of `expand` do, is changed in place",
        "write `x = x + y` in place of `x += y`, or `.clone()` it first",
    ),
    "nothing_in_checkpoint": (
        "nothing that runs inside of this reentrant checkpoint leads back to what requires grad",
        "pass `use_reentrant=False` to `checkpoint`, or do not checkpoint what is frozen",
    ),
    "no_setup_context": (
        "this Function is written in a way that `torch.func` does not take",
        "give it a `setup_context(ctx, inputs, output)`, and a `forward` without `ctx`",
    ),
    "random_in_vmap": (
        "`vmap` is not told whether random numbers are the same for each sample",
        'pass `randomness="different"` or `randomness="same"` to `vmap`, or draw them outside',
    ),
    "in_place_in_vmap": (
        "a value for each sample is written into a tensor that all of them share",
        "collect the values in a list and `torch.stack` them, or make the tensor from one of the inputs",
    ),
    "norm_in_vmap": (
        "a layer counts its inputs in place, which `vmap` does not allow",
        "use `GroupNorm`, or pass `track_running_stats=False` to the layer",
    ),
    "anomaly": (
        "the backward of this operation is not finite at the values that it was given",
        "keep it away from them: add an epsilon, or choose what goes in with `torch.where`",
    ),
    "grad_outputs": (
        "`grad_outputs` has another shape than what is differentiated",
        "pass `torch.ones_like(output)`, or a weight for each of its elements",
    ),
    "behind_a_hook": (
        "what a module with a full backward hook returns is changed in place",
        "pass `inplace=False` to what follows the module, or hook the one behind it",
    ),
    "item_in_vmap": (
        "`vmap` cannot take a number out of a batch of tensors, nor decide by one",
        "stay in torch: `torch.clamp`, `torch.where` and `torch.minimum` do without `.item()`",
    ),
    "func_of_a_vector": (
        "`torch.func.grad` is given a function that returns a tensor with several elements",
        "reduce it to one number inside of the function, with `.mean()` or `.sum()`",
    ),
    "optimizer_stepped": (
        "the optimizer changes weights here that this backward still needs ({1})",
        "step the optimizer after this backward, or compute the loss again after the step",
    ),
    "kept": (
        "a tensor that an earlier backward has freed is kept and used again{1}",
        "compute it anew in every step, or `.detach()` it where it is kept",
    ),
    "twice": (
        "an earlier backward went through the same graph and freed it",
        "add the losses and call `backward()` once, `.detach()` what one should not train, or pass `retain_graph=True`",
    ),
    "twice_in_backward": (
        "the `backward` of a Function goes through a graph here that an earlier pass has freed",
        "compute all of it anew in there, `.detach()` what it shares with other calls, or pass `retain_graph=True` inside",
    ),
    "leaf_in_place": (
        "a parameter, or another leaf that requires grad, is changed in place",
        "write `x = x + y` in place of `x += y`, or do it under `torch.no_grad()`",
    ),
    "index_of_scalar": (
        "a tensor with 0 dimensions, such as a loss, is indexed",
        "read its number with `.item()`",
    ),
    "not_scalar": (
        "`backward()` starts from a tensor with several elements",
        "reduce it to one number, with `.mean()` or `.sum()`",
    ),
    "inference": (
        "a tensor made under `torch.inference_mode()` is used where gradients are computed",
        "make it under `torch.no_grad()`, or `.clone()` it outside of inference mode",
    ),
    "view_in_place": (
        "one of several views of a tensor is changed in place",
        "write `x = x + y` in place of `x += y`",
    ),
    "out_argument": (
        "`out=` writes the result into a tensor of yours, which has no derivative",
        "call it without `out=`, and keep what it returns",
    ),
    "nothing_to_retain": (
        "`retain_grad()` is called on a tensor that has no history: it comes from here",
        "look for a `detach` or `no_grad` on the way to it, or call `retain_grad()` where gradients are on",
    ),
    "nothing_to_hook": (
        "a hook is registered on a tensor that has no history: it comes from here",
        "register it where gradients are on, or only `if x.requires_grad`",
    ),
    "computed_off": (
        "the loss is computed while gradients are off",
        "compute it outside of `no_grad` and `inference_mode`, or under `with torch.enable_grad():`",
    ),
    "in_double": (
        "a tensor in float64 meets those of the model, which are in float32",
        "make it in float32: `torch.tensor(values, dtype=torch.float32)`, or `.float()`",
    ),
    "output_without_history": (
        "what is differentiated here has no history: it was lost here",
        "pass `create_graph=True` where it is a derivative itself, and look for a `detach` or `no_grad`",
    ),
    "not_none": (
        "the `backward` of this Function returns a gradient for an argument that is no tensor",
        "return None in the place of each argument of `forward` that is no tensor",
    ),
    "grad_in_backward": (
        "the `backward` of a Function runs with gradient mode off, so that what it computes has no history",
        "compute it under `with torch.enable_grad():`, from inputs that require grad",
    ),
    "legacy_function": (
        "an instance of a `torch.autograd.Function` is called",
        "make `forward` and `backward` static methods, and call `MyFunction.apply(...)`",
    ),
    "outlived": (
        "a tensor of an earlier step is used with its graph{1}, whose weights the optimizer has changed since",
        "`.detach()` it where it is kept",
    ),
    "numpy": (
        "a tensor that requires grad is turned into a NumPy array",
        "call `.detach().numpy()` where no gradient is wanted, or stay in torch where one is",
    ),
    "integer": (
        "a tensor of integers or booleans is asked for a gradient",
        "keep the value in floating point: what `argmax`, a comparison or a cast gives has none",
    ),
    "copy_of_a_result": (
        "a tensor with a history is copied with `deepcopy`, which takes leaves alone",
        "copy `x.detach().clone()`, or do not keep the result of a computation on the object",
    ),
    "not_in_graph": (
        "a gradient is asked for {1} the output was not computed from",
        "pass `allow_unused=True` where that is right, or look for a cut between the two",
    ),
    "wrong_count": (
        "the `backward` of this Function returns another number of gradients than `forward` takes",
        "return one value for each argument of `forward` after `ctx`, and None where there is none",
    ),
    "wrong_shape": (
        "the `backward` of this Function returns a gradient that does not have the shape of its argument",
        "return each gradient in the shape of the argument of `forward` that it belongs to: sum over what was broadcast",
    ),
    "no_tensor_for_a_gradient": (
        "the `backward` of this Function returns a number, or something else, in the place of a gradient",
        "return a tensor for each argument of `forward` that has a gradient, and None for each other one",
    ),
    "no_backward": (
        "this Function has no `backward`, and a gradient is asked for through it",
        "give it a static method `backward(ctx, *grad_outputs)`, or `.detach()` what goes into it",
    ),
    "backward_arguments": (
        "the `backward` of this Function does not take one gradient for each output of `forward`",
        "give it an argument for each of them behind `ctx`: those of outputs that nobody used are zeros",
    ),
    "forward_arguments": (
        "the `forward` of this Function does not take what it is given here",
        "let it take `ctx` and each argument of `apply`, or define `setup_context` where it is to do without `ctx`",
    ),
    "saved_no_tensor": (
        "`save_for_backward` is given something that is no tensor",
        "keep shapes, numbers and flags as attributes: `ctx.shape = x.shape`",
    ),
    "not_returned": (
        "the `forward` of this Function says that it changes a tensor in place, and does not return it",
        "return the very tensor that `ctx.mark_dirty` is given, or leave the mark out where nothing is changed",
    ),
    "not_kept": (
        "`backward` reads `ctx.{1}`, which was not set when the Function was called",
        "set `ctx.{1}` wherever the Function is called, before it returns",
    ),
    "saved_otherwise": (
        "`backward` takes another number of tensors out of `ctx.saved_tensors` than were saved here",
        "take as many as `save_for_backward` is given, in its order",
    ),
    "once_differentiable": (
        "the `backward` of this Function is marked with `@once_differentiable`, and is differentiated here",
        "write `backward` with operations of torch and without the mark, or do without `create_graph=True`",
    ),
    "complex_loss": (
        "the loss is a complex number",
        "take its real part, or the square of its absolute value: `.real`, `.abs().square()`",
    ),
    "reentrant_inputs": (
        "a reentrant checkpoint cannot work out gradients for some tensors only",
        "pass `use_reentrant=False` to `checkpoint`",
    ),
    "no_formula": (
        "this custom operator has no derivative",
        "give it one with `register_autograd`, or `.detach()` its inputs where no gradient is wanted",
    ),
    "no_derivative": (
        "torch has no derivative for this operation with these inputs",
        "use a differentiable operation, or `.detach()` the input that needs no gradient",
    ),
}


_AUGMENTED = {
    "add_": "+",
    "sub_": "-",
    "mul_": "*",
    "div_": "/",
    "pow_": "**",
    "__iadd__": "+",
    "__isub__": "-",
    "__imul__": "*",
    "__itruediv__": "/",
    "__ipow__": "**",
}
"""Operations in place that Python has an operator for."""
_WITHOUT_RESULT = frozenset(
    ["__setitem__", "zero_", "fill_", "copy_", "normal_", "uniform_", "set_"]
)
"""Those that have no twin which leaves its argument as it is."""


def overwritten(kind: str, where: str | None, operation: str, maker: str | None) -> str:
    """Return the note on a tensor that was changed before a backward needed it, with the way around the write.

    Example:
        >>> print(overwritten("overwritten", None, "torch.Tensor.masked_fill_", None))
        `torch.Tensor.masked_fill_` changes a tensor in place here that a backward needs as it was
          = help: use what `masked_fill` returns, or change it after the backward pass
    """
    short = operation.rpartition(".")[2]
    # `x += y` is an `add_` too.
    sign = _AUGMENTED.get(short)
    if sign is not None and where is not None and f"{sign}=" in where:
        advice = f"write `x = x {sign} y` in place of `x {sign}= y`"
    elif short in _WITHOUT_RESULT:
        advice = "write into a `.clone()` of it, or choose with `torch.where`"
    elif short.endswith("_"):
        advice = f"use what `{short.removesuffix('_')}` returns"
    else:
        advice = "pass `inplace=False`"
    return note(kind, where, operation, advice, maker)


def note(kind: str, where: str | None, *facts: str | None) -> str:
    """Return the note that is added to an error: the root cause's place, the fact, and the way out.

    Args:
        kind: A key of ``ERRORS``.
        where: The root cause's place, as ``place`` writes it.
        facts: What the sentence has gaps for.

    Example:
        >>> print(note("index_of_scalar", "train.py:7: `loss.data[0]`"))
        a tensor with 0 dimensions, such as a loss, is indexed
          --> train.py:7: `loss.data[0]`
          = help: read its number with `.item()`
    """
    fact, advice = ERRORS[kind]
    gaps = (where, *("an operation" if given is None else given for given in facts))
    lines = [fact.format(*gaps)]
    if where is not None:
        lines.append(f"  --> {where}")
    if advice is not None:
        lines.append(f"  = help: {advice.format(*gaps)}")
    return "\n".join(lines)


def set_here(attribute: str, where: str) -> str:
    """Say where an attribute is set that decides what a forward reads."""
    return f"`self.{attribute}` is set here\n  --> {where}"


def cut_as_well(where: str) -> str:
    """Say where else parameters are cut off from a loss."""
    return f"others are cut off from the loss as well\n  --> {where}"


def called_inside(where: str, *, for_good: bool = False) -> str:
    """Say which call, made with gradients off, led to the failing line; inference mode stays on inside of it."""
    advice = "use `torch.no_grad()` there: `enable_grad` does not lift inference mode"
    said = f"gradients are off in this call\n  --> {where}"
    return f"{said}\n  = help: {advice}" if for_good else said


def frozen_too(folded: str, where: str | None) -> str:
    """Say that parameters are frozen which a loss without a history was, or may have been, computed from."""
    at = "" if where is None else f"\n  --> {where}"
    return f"`requires_grad` is False for {folded}{at}"
