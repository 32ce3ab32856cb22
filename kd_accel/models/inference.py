"""Faster execution of an unchanged network: conv-bn fusion, memory formats, CPU kernels, and the choice of GPU kernels.

Fusion and CPU kernels compute the same function as the original network; sums may differ in their last bits. The measurements
are in docs/profile.md.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_accel.models.modes import in_evaluation_mode

_PROBED_IMAGES = 2
_TOLERANCE = 1e-3
"""Largest difference of the logits of a fused network, relative to the largest logit."""

CpuKernels = Literal["auto", "always", "never"]


def fuse_conv_bn(model: nn.Module, *, layers: Collection[str], image_size: int) -> nn.Module | None:
    """Fuse each BatchNorm into the convolution directly before it, in a copy of the model.

    In evaluation mode BatchNorm is one scale and one shift per channel, which can be folded into the convolution. The order of
    the modules is read from a `torch.fx` trace. The copy keeps the model's own forward and module names, with `nn.Identity` in
    place of each fused BatchNorm.

    Args:
        model: Network to copy; it is not changed.
        layers: Names of the modules whose outputs are used as features.
        image_size: Height and width, in pixels, of the random images on which copy and model are compared.

    Returns:
        The frozen copy in evaluation mode. None if no pair can be fused, if the output of one of `layers` is that of a
        convolution before its BatchNorm, if the network cannot be traced, or if the copy's logits differ from the model's.

    References:
        Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        section 3.2.
    """
    fused = copy.deepcopy(model).eval()
    pairs = _conv_bn_pairs(fused)
    if not pairs or any(_separates(layer, *pair) for layer in layers for pair in pairs):
        return None
    for conv_name, norm_name in pairs:
        conv = fuse_conv_bn_eval(fused.get_submodule(conv_name), fused.get_submodule(norm_name))  # type: ignore[type-var, arg-type]
        fused.set_submodule(conv_name, conv)
        fused.set_submodule(norm_name, nn.Identity())
    return fused.requires_grad_(False) if outputs_agree(model, fused, image_size, tolerance=_TOLERANCE) else None


def cast_for_autocast(
    model: nn.Module, *, image_size: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> nn.Module | None:
    """Copy a frozen model, with the weights of its convolutions and linear layers stored in the type of autocast.

    Autocast casts the weights of a frozen network again in each forward, about half of the operators of a fused ResNet. The
    copy runs under the same autocast and computes the same bits.

    Args:
        model: Network in evaluation mode; it is not changed.
        image_size: Height and width, in pixels, of the random images on which copy and model are compared.
        autocast: Context in which the network runs.

    Returns:
        The copy. None without autocast or parameters, or if the outputs differ in any bit, as the model's own code may read the
        weights.
    """
    if (first := next(model.parameters(), None)) is None:
        return None
    device = first.device
    with autocast():
        if not torch.is_autocast_enabled(device.type):
            return None
        dtype = torch.get_autocast_dtype(device.type)
        cast = copy.deepcopy(model)
        for module in cast.modules():
            # Not for subclasses, whose forward may use the weights otherwise.
            own = module.named_parameters(recurse=False) if type(module) in _CAST_BY_AUTOCAST else ()
            for name, weight in own:
                setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
        return cast if outputs_agree(model, cast, image_size, tolerance=0.0) else None


def image_memory_format(channels_last: bool | None, device: torch.device) -> torch.memory_format:
    """Return the memory format of images, which all feature maps inherit.

    Args:
        channels_last: None selects channels_last on GPUs, whose half-precision kernels are written for it, and the contiguous
            format on CPUs, where channels_last slows down maps of few pixels.
        device: Device of the images.
    """
    is_last = device.type == "cuda" if channels_last is None else channels_last
    return torch.channels_last if is_last else torch.contiguous_format


def weight_memory_format(channels_last: bool | None, device: torch.device) -> torch.memory_format:
    """Return the memory format of trained weights: that of the images on GPUs, always contiguous on CPUs.

    CPU kernels return contiguous weight gradients for maps of either format. With channels_last weights each gradient would
    be converted, which takes about 5 % of a ResNet's training step.
    """
    return image_memory_format(channels_last, device) if device.type == "cuda" else torch.contiguous_format


def use_cpu_kernels(model: nn.Module, device: torch.device | str, choice: CpuKernels = "auto") -> None:
    """Convert convolutions to `OnePixelConv2d` and max-pools to `ChannelsLastMaxPool2d`, in place.

    Args:
        model: Network to convert. It keeps its parameters, names and hooks. Subclasses of `nn.Conv2d`, and convolutions with
            groups, dilation, or a padding other than zeros narrower than the kernel, are not converted.
        device: Device on which the network will run.
        choice: `auto` converts the network for CPUs only: the effect on GPUs is not measured, and TF32 rounds a convolution and
            a matrix product differently. `always` converts it for any device, `never` for none.
    """
    if choice == "never" or (choice == "auto" and torch.device(device).type != "cpu"):
        return
    for module in model.modules():
        # Assigning the class, unlike replacing the module, keeps its hooks and every reference to it. This is safe because
        # neither subclass has attributes of its own.
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = OnePixelConv2d
        elif type(module) is nn.MaxPool2d and not module.return_indices:
            module.__class__ = ChannelsLastMaxPool2d


class OnePixelConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes an output of one pixel as a matrix product.

    The last stages of an ImageNet network reduce small images to maps of one pixel, where a padded 3x3 convolution multiplies
    eight of its nine weights by zeros. The matrix product uses only the weights that overlap the map.

    Shape:
        Input [B, D_in, H, W]; output [B, D_out, H_out, W_out], as `nn.Conv2d`. The matrix product replaces the convolution
        where H_out = W_out = 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the convolution to `input`."""
        top, left = cast(tuple[int, int], self.padding)
        if not self._outputs_one_pixel(input, top, left):
            return super().forward(input)
        # The kernel has one position, with its corner at (-top, -left), so it overlaps the first rows and columns of the map.
        height, width = min(self.kernel_size[0] - top, input.shape[2]), min(self.kernel_size[1] - left, input.shape[3])
        weight = _crop_kernel(self.weight, top, left, height, width)
        output = functional.linear(input[:, :, :height, :width].flatten(1), weight.flatten(1), self.bias)
        # In place, because a view created under no_grad cannot be modified in place after gradients are enabled again.
        return output.unsqueeze_(2).unsqueeze_(3)

    def _outputs_one_pixel(self, input: Tensor, top: int, left: int) -> bool:
        last_row = (input.shape[-2] + 2 * top - self.kernel_size[0]) // self.stride[0]
        last_column = (input.shape[-1] + 2 * left - self.kernel_size[1]) // self.stride[1]
        return input.dim() == 4 and last_row == last_column == 0


class ChannelsLastMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` that converts contiguous maps to channels_last, for which PyTorch has a vectorized CPU kernel.

    Outputs are bitwise equal to those of `nn.MaxPool2d`, in the same memory format. Maps that require a gradient are not
    converted, because converting the gradient back would take as long as the forward saves.

    Shape:
        Input [B, D, H, W]; output [B, D, H_out, W_out].
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the max-pool to `input`."""
        if input.dim() != 4 or input.requires_grad or not input.is_contiguous():
            return super().forward(input)
        return super().forward(input.contiguous(memory_format=torch.channels_last)).contiguous()


_CAST_BY_AUTOCAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, OnePixelConv2d)


def choose_kernels(*, deterministic: bool = False, tf32: bool = True) -> None:
    """Set PyTorch's process-wide switches for autotuned, deterministic and TF32 kernels.

    Call this function before CUDA is initialized: cuBLAS reads its workspace configuration only at that time.

    Args:
        deterministic: Allow only deterministic algorithms, on any device, which is slower. If False, cuDNN benchmarks its
            kernels for each shape and uses the fastest.
        tf32: Allow float32 convolutions and matrix products to round their inputs to TF32 (10 bits of mantissa) on GPUs that
            support it. PyTorch's defaults are TF32 for convolutions and float32 for matrix products.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _conv_bn_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names (convolution, BatchNorm) of all pairs that can be fused.

    Each module of a pair is called once, and no other module uses the output of the convolution.
    """
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception:
        # The model's code can raise any exception when it is traced without values.
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[node.target]) for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        source = node.args[0] if node.args else None
        if not (_calls(node, modules, nn.BatchNorm2d) and isinstance(source, fx.Node) and _calls(source, modules, nn.Conv2d)):
            continue
        is_exclusive = len(source.users) == 1 and calls[id(modules[source.target])] == calls[id(modules[node.target])] == 1
        if is_exclusive and modules[node.target].track_running_stats:
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _calls(node: fx.Node, modules: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is kind


def _separates(layer: str, convolution: str, norm: str) -> bool:
    """Return whether `layer` is or contains the convolution but not its BatchNorm, so that fusion would change its output."""
    return f"{convolution}.".startswith(f"{layer}.") and not f"{norm}.".startswith(f"{layer}.")


@torch.no_grad()
def outputs_agree(model: nn.Module, changed: nn.Module, image_size: int, *, tolerance: float) -> bool:
    """Return whether both networks compute the same logits on random images, up to a fraction of the largest logit.

    The logits differ if the model's code reads attributes of a changed module.
    """
    parameter = next(model.parameters())
    images = torch.randn(_PROBED_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        with in_evaluation_mode(model):
            expected, actual = model(images), changed(images)
        return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
    except Exception:
        # The changed model's forward can raise any exception, for example for a missing attribute.
        return False


def _crop_kernel(weight: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Return weight[:, :, top : top + height, left : left + width] as a contiguous tensor.

    Negative padding writes the gradient once; slicing would write it once per axis.
    """
    bottom, right = weight.shape[2] - top - height, weight.shape[3] - left - width
    return functional.pad(weight, (-left, -right, -top, -bottom)) if top or left or bottom or right else weight


def _is_plain(module: nn.Conv2d) -> bool:
    """Return whether a convolution has one group, no dilation, and zero padding smaller than its kernel."""
    if isinstance(module.padding, str) or module.padding_mode != "zeros" or module.groups != 1 or module.dilation != (1, 1):
        return False
    return all(padding < size for padding, size in zip(module.padding, module.kernel_size, strict=True))
