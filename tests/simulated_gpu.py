"""
A GPU that is none: its tensors say that they are on cuda:0, are computed on the CPU, and refuse what those of a GPU refuse,
to meet a tensor that is not there. So a machine without a GPU sees whether everything is put where it belongs. Of all else
that a GPU is, precision, kernels, memory, streams, torch.compile, it knows nothing.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

GPU = torch.device("cuda", 0)
TAKES_ANY = {"_to_copy", "copy_"}  # operators from one device to another
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # indices may lie on the CPU


class OnGPU(torch.Tensor):
    """The tensor `inner` of the CPU as one of the simulated GPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGPU":
        with torch.inference_mode(False):  # else views of tensors made outside that mode cannot be made inside
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
            )
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def untyped_storage(self) -> torch.UntypedStorage:  # this and the next for safetensors, which asks where a tensor lies
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            index = name in TAKES_INDICES and tensor.dtype in (torch.int64, torch.bool)
            if not (isinstance(tensor, OnGPU) or tensor.dim() == 0 or name in TAKES_ANY or index):
                raise RuntimeError(f"{name}: all tensors must be on one device, but {tuple(tensor.shape)} is on the CPU")
        inner = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
        args, kwargs = pytree.tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
        found = func(*args, **kwargs)
        if name == "copy_" and id(found) not in inner:  # from the GPU into a tensor of the CPU
            return found
        return pytree.tree_map_only(torch.Tensor, lambda tensor: inner[id(tensor)] if id(tensor) in inner else OnGPU(tensor), found)


class Move(torch.autograd.Function):
    """A tensor on another device and in another dtype."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, to_gpu: bool, dtype: torch.dtype) -> torch.Tensor:
        ctx.came_from = tensor.is_cuda, tensor.dtype
        inner = (tensor.inner if tensor.is_cuda else tensor).to(dtype, copy=True)
        return OnGPU(inner) if to_gpu else inner

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return Move.apply(grad, *ctx.came_from), None, None


class DeviceArguments(TorchFunctionMode):
    """Calls that name a device: torch itself, built without CUDA, would refuse them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # the arguments of module.to()
            return (GPU, args[0].dtype, False, None) if args and isinstance(args[0], OnGPU) else func(*args, **kwargs)
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (*args, "cpu")
        if func is torch.Tensor.to:
            return moved(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
        return OnGPU(func(*args, **kwargs | {"device": "cpu"}))


def moved(tensor: torch.Tensor, *where, device=None, dtype: torch.dtype | None = None, copy: bool = False, **_) -> torch.Tensor:
    """Tensor.to."""
    for word in where:
        if isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, torch.Tensor):
            device, dtype = word.device, word.dtype
        elif isinstance(word, (str, torch.device)):
            device = word
    to_gpu = tensor.is_cuda if device is None else torch.device(device).type == "cuda"
    if to_gpu == tensor.is_cuda and dtype in (None, tensor.dtype) and not copy:
        return tensor
    return Move.apply(tensor, to_gpu, dtype or tensor.dtype)


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Within it torch.cuda has one GPU, too old for bfloat16 and torch.compile."""
    answers = dict(is_available=True, device_count=1, get_device_capability=(6, 0), get_device_name="simulated", set_device=None,
                   max_memory_allocated=2**20, synchronize=None, empty_cache=None, reset_peak_memory_stats=None,
                   is_current_stream_capturing=False)  # fmt: skip
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        # torch built with CUDA would have its optimizers ask the GPU's stream whether it is being captured
        stack.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to(GPU) makes parameters of another class
        stack.enter_context(DeviceArguments())
        yield
