"""What goes on around a call: transforms, forward mode, tracing. Some of it kernels cannot follow."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Whether a transform of torch.func is active. It has no public name; autograd.Function asks the same.
transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _inside_level() -> bool:
    return forward_ad._current_level >= 0


# Dynamo reads a global once for a whole graph; of a function so marked it asks anew at every call, and puts in the
# answer. (torch.compiler.assume_constant_result sets the mark too, and imports Dynamo, which takes a second.)
_inside_level._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken: jvp, jacfwd, hessian, linearize, dual_level.

    Kernels would drop them without a word, and of a Function's own rule torch loses what is above one level
    (pytorch/pytorch#197867) and all of it in torch.compile (#192985): the reference runs instead.
    """
    # The first half is what torch.compile guards on, for a compiled function that is called within a level.
    return forward_ad._current_level >= 0 or _inside_level()


_is_mapped: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def mapped_backward(*upstream: Tensor) -> bool:
    """Whether a backward pass is that of several upstream gradients at once: is_grads_batched, vectorize=True."""
    return not torch.compiler.is_compiling() and any(map(_is_mapped, upstream))


def plain_backward(*upstream: Tensor) -> bool:
    """Whether a backward pass is neither differentiated (create_graph, forward mode) nor mapped (vmap)."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() or transforming() or forward_mode():
        return False
    return not any(map(_is_mapped, upstream))


def jit_tracing() -> bool:
    """Whether torch.jit.trace records this call. It does not see tensors that are in a tuple."""
    return torch._C._get_tracing_state() is not None  # torch.compile knows the answer to this one


def concrete(tensor: Tensor) -> bool:
    """Whether Python may ask for values: not where a fake tensor, or a traced one, stands for others."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    if not torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx, torch.func.linearize
