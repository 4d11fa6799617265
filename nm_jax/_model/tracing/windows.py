"""The windows of a convolution."""

from typing import NamedTuple


class Windows(NamedTuple):
    """The windows of a convolution over activations laid out as (images, *space, features), as XLA defines them."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]  # dilation of the activations (transposed convolutions)
    dilation: tuple[int, ...]  # of the kernel
    groups: int

    def padded(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of activations after spreading and padding."""
        sizes = zip(space, self.spread, self.padding, strict=True)
        return tuple((size - 1) * spread + 1 + sum(padding) for size, spread, padding in sizes)

    def outputs(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the result, for activations that are padded already."""
        sizes = zip(space, self.kernel, self.strides, self.dilation, strict=True)
        return tuple((size - (k - 1) * dilation - 1) // stride + 1 for size, k, stride, dilation in sizes)
