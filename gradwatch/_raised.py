"""Where the root of an error of torch's lies, when the user's forward or backward raised.

What this room knows that no other does: the words of torch's messages about autograd, which of the rooms below
explains which, and what is left to say where the step was not traced. The error itself is never changed: it gets
a note, and the trace's own lines leave its traceback.

Limits: messages are recognised by their words, in English, as torch 2.6 to 2.14 writes them; an
unknown one gets no note.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from gradwatch import _error_words, _frames, _source, _words, explain
from gradwatch._asked import (
    asked_for_nothing,
    gradients_of_another_shape,
    ill_defined,
    in_double,
    loss_made_by,
    not_a_number,
    not_in_graph,
    number_for_a_loss,
    without_derivative,
    without_formula,
)
from gradwatch._failure import (
    BY_PLACE,
    Raised,
    at,
    failing,
    hide_own,
    last_of_user,
    listed,
    raising,
    role_of,
)
from gradwatch._functions import (
    in_function,
    no_tensor_for_a_gradient,
    not_kept,
    once_differentiable,
    saved_otherwise,
    told_to_ctx,
    with_other_arguments,
    without_backward,
)
from gradwatch._histories import (
    frozen_ones,
    gone_over_twice,
    no_history,
    switched_off,
    without_history,
)
from gradwatch._kept import copied_whole, kept_anywhere, outlived
from gradwatch._optimizers import (
    dense_gradients,
    half_parameters,
    in_two_groups,
    not_finite,
    nothing_to_step,
    sparse_gradients,
    stepped_over_nothing,
    unscaled_twice,
)
from gradwatch._overwrites import (
    behind_a_hook,
    expanded_in_place,
    overwritten,
    view_without_history,
)
from gradwatch._refused import (
    array_of_a_leaf,
    changed_by_a_hook,
    from_inference_mode,
    func_of_a_vector,
    hook_of_a_module,
    in_place_in_vmap,
    inputs_in_a_reentrant_checkpoint,
    leaf_in_place,
    made_and_failing,
    no_leaf,
    no_parameter,
    none_for_a_gradient,
    norm_in_vmap,
    nothing_in_a_checkpoint,
    random_in_vmap,
    recomputed_otherwise,
    serialised_result,
)
from gradwatch.report import Diagnosis, Status

if TYPE_CHECKING:
    from torch import nn

    from gradwatch._diagnose import Inspection
    from gradwatch._failure import Find

_log = logging.getLogger("gradwatch")


def add_note(
    error: Exception,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> None:
    """Add a note with the root cause's line and the way out to an error of the user's code.

    Args:
        error: The exception; it is not changed otherwise.
        inspection: The stopped trace of the step that raised, None where it was not traced.
        model: The model whose classes are read for what was done before the step.
        known: The diagnoses that hold.
    """
    if any("GradWatch" in note for note in getattr(error, "__notes__", ())):
        return
    try:
        note = _note(error, inspection, model, known)
        hide_own(error)
    except Exception as failure:  # noqa: BLE001 -- ours, never the user's problem
        _log.warning("an error could not be explained", exc_info=failure)
        return
    if note:
        error.add_note(f"GradWatch: {note}")


def _note(
    error: Exception,
    inspection: Inspection | None,
    model: nn.Module,
    known: tuple[Diagnosis, ...],
) -> str | None:
    message = str(error)
    if "Expected to have finished reduction in the prior iteration" in message:
        missing = [d for d in known if d.status is Status.MISSING]
        said = [explain.render(diagnosis) for diagnosis in missing]
        return "\n\n".join([_error_words.note("ddp", None), *said]) if missing else None
    if "optimizer got an empty parameter list" in message:
        return nothing_to_step(error, model)
    for words, find in _KINDS:
        if words in message:
            if inspection is not None:
                return find(Raised(error, inspection, model))
            if find is none_for_a_gradient:
                return _none_untraced(error, known)
            return None if find is number_for_a_loss else _untraced(error, model, find)
    return None


def _none_untraced(error: Exception, known: tuple[Diagnosis, ...]) -> str | None:
    """Explain a ``.grad`` that is None by what is known of the parameters without one."""
    last = last_of_user(error)
    missing = [explain.render(d) for d in known if d.status is Status.MISSING]
    if last is None or not missing or ".grad" not in _source.text_of(last[:2]):
        return None
    return "\n\n".join([_error_words.note("grad_is_none", at(last)), *missing])


def _untraced(error: Exception, model: nn.Module, find: Find) -> str:
    """Explain an error of a step that was not traced by its traceback, the model, and an earlier trace."""
    kind = BY_PLACE.get(find)
    place = None if kind is None else at(last_of_user(error))
    if kind is not None and place is not None:
        return _error_words.note(kind, place)
    if find in {gone_over_twice, overwritten}:
        made = _frames.site_of(outlived(error))
        kept = kept_anywhere(model, made)
        if kept is None and made is not None:
            kept = f"{_words.place(made)} (made here)", ""
        if kept is not None and (find is gone_over_twice or made is not None):
            return _error_words.note("kept" if find is gone_over_twice else "outlived", *kept)
    if find is copied_whole and (kept := kept_anywhere(model)) is not None:
        last = at(last_of_user(error))
        return _error_words.note("copy_of_a_result", listed(role_of("kept here", kept[0]), last))
    untraced = _error_words.note("untraced", role_of("it fails here", at(last_of_user(error))))
    if find is no_history:
        said = [part for part in (untraced, frozen_ones(model)) if part]
        return switched_off(model) or "\n\n".join(said)
    return untraced


BY_PLACE.update(
    {
        array_of_a_leaf: "numpy",
        gradients_of_another_shape: "grad_outputs",
        half_parameters: "half_parameters",
        leaf_in_place: "leaf_in_place",
        random_in_vmap: "random_in_vmap",
        unscaled_twice: "unscaled_twice",
    }
)
_KINDS: tuple[tuple[str, Find], ...] = (
    ("does not require grad and does not have a grad_fn", no_history),
    ("modified by an inplace operation", overwritten),
    ("Found dtype Double but expected", in_double),
    ("Trying to backward through the graph a second time", gone_over_twice),
    ("a leaf Variable that requires grad is being used in an in-place", leaf_in_place),
    ("a view of a leaf Variable that requires grad", leaf_in_place),
    ("invalid index of a 0-dim tensor", made_and_failing("index_of_scalar")),
    (
        "can be implicitly created only for scalar outputs",
        loss_made_by("not_scalar", lambda shape, _: math.prod(shape) > 1),
    ),
    (
        "can be implicitly created only for real scalar outputs",
        loss_made_by("complex_loss", lambda _, dtype: dtype.is_complex, frozenset(["mean", "sum"])),
    ),
    ("an `inputs` parameter", inputs_in_a_reentrant_checkpoint),
    ("Inference tensors cannot be saved for backward", from_inference_mode),
    ("Inplace update to inference tensor", from_inference_mode),
    ("on inference tensor outside InferenceMode", from_inference_mode),
    ("is not differentiable with respect to argument", made_and_failing("no_derivative")),
    ("is not implemented", without_derivative),
    ("no autograd formula was registered", without_formula),
    ("view was created in no_grad mode and is being modified inplace", view_without_history),
    ("BackwardHookFunction is a view", behind_a_hook),
    ("is being modified inplace", failing("view_in_place")),
    ("arguments don't support automatic differentiation", failing("out_argument")),
    ("can't retain_grad on Tensor", without_history("nothing_to_retain")),
    (
        "cannot register a hook on a tensor that doesn't require",
        without_history("nothing_to_hook"),
    ),
    ("Can't call numpy() on Tensor that requires grad", array_of_a_leaf),
    ("nly Tensors of floating point", failing("integer")),
    ("Can't detach views in-place", failing("detach_of_a_view")),
    ("Only Tensors created explicitly by the user", copied_whole),
    ("appears to not have been used in the graph", not_in_graph),
    ("One of the differentiated Tensors does not require grad", without_history("not_wanting")),
    ("use var_no_grad = var.detach()", made_and_failing("flag_of_a_result")),
    ("only change requires_grad flags of leaf", made_and_failing("flag_set_on_a_result")),
    ("Legacy autograd function with non-static forward", raising("legacy_function")),
    ("returned an incorrect number of gradients", in_function("wrong_count")),
    ("returned an invalid gradient", in_function("wrong_shape")),
    ("returned a gradient different than None", in_function("not_none")),
    ("expected Variable or None", no_tensor_for_a_gradient),
    ("must implement either the backward or vjp", without_backward),
    (".backward() takes ", with_other_arguments),
    (".backward() missing ", with_other_arguments),
    (".forward() takes ", with_other_arguments),
    (".forward() missing ", with_other_arguments),
    (
        "save_for_backward can only save variables",
        told_to_ctx("saved_no_tensor", "save_for_backward"),
    ),
    (
        "marked as dirty during the forward method were not",
        told_to_ctx("not_returned", "mark_dirty"),
    ),
    ("Backward' object has no attribute '", not_kept),
    ("values to unpack (expected", saved_otherwise),
    ("marked with @once_differentiable", once_differentiable),
    ("has changed the size of value", changed_by_a_hook),
    ("has changed the type of value", changed_by_a_hook),
    (
        "number of tensors was saved during the original forward and recomputation",
        recomputed_otherwise,
    ),
    ("Recomputed values for the following tensors have different metadata", recomputed_otherwise),
    ("can't optimize a non-leaf Tensor", no_leaf),
    ("' as parameter '", no_parameter),
    ("' object to parameter '", raising("registered_tensor")),
    ("unscale_() has already been called", unscaled_twice),
    ("unscale_() is being called after step()", raising("stepped_before")),
    ("step() has already been called since", raising("stepped_before")),
    ("Attempting to unscale FP16 gradients", half_parameters),
    ("No inf checks were recorded for this optimizer", stepped_over_nothing),
    ("does not support sparse gradients", sparse_gradients),
    ("refusing to serialize non-leaf tensor", serialised_result),
    ("attempting to assign a gradient of size", made_and_failing("grad_of_another_size")),
    ("attempting to assign a gradient with dtype", made_and_failing("grad_of_another_type")),
    ("is non-finite, so it cannot be clipped", not_finite),
    ("()` cannot be empty", asked_for_nothing),
    ("optimizer can only optimize Tensors", raising("not_parameters")),
    ("given to the optimizer should be an iterable", raising("not_parameters")),
    ("appear in more than one parameter group", in_two_groups),
    ("cannot resize variables that require grad", failing("resized")),
    ("from the 'Sparse", sparse_gradients),
    ("refers to a single memory location", expanded_in_place),
    ("refer to a single memory location", failing("overlapping")),
    ("call Tensor.requires_grad_() (or perhaps", raising("functional_in_transform")),
    ("so it is ill-defined", ill_defined),
    ("Closure use is not currently supported if GradScaler", raising("closure_with_scaler")),
    ("does not support dense gradients", dense_gradients),
    ("data set to a tensor that requires gradients must be", failing("integer_data")),
    ("that would mutate a captured Tensor", raising("captured_in_place")),
    ("zero-dimensional tensor (at position", failing("cat_of_scalars")),
    ("Batch norm got a batched tensor as input", norm_in_vmap),
    ("' returned nan values in its", not_a_number),
    ("Backward hook returned an invalid number", hook_of_a_module),
    ("override the setup_context staticmethod", raising("no_setup_context")),
    ("none of output has requires_grad=True", nothing_in_a_checkpoint),
    ("vmap: called random operation", random_in_vmap),
    ("vmap: inplace arithmetic", in_place_in_vmap),
    ("object has no attribute 'backward'", number_for_a_loss),
    ("'NoneType'", none_for_a_gradient),
    ("vmap: It looks like you're", raising("item_in_vmap")),
    ("Mismatch in shape: grad_output", gradients_of_another_shape),
    ("to return a scalar Tensor", func_of_a_vector),
    ("to return a scalar tensor", func_of_a_vector),
)
