"""Shapes of the weights of whole models."""

Shapes = dict[tuple[int, ...], int]  # how many there are of each


def _resnet50() -> Shapes:
    """Convolution kernels (height, width, in, out) of ResNet-50 without the first; the classifier."""
    shapes: Shapes = {}
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for k in range(blocks):
            for shape in ((1, 1, width_in, width), (3, 3, width, width), (1, 1, width, 4 * width)):
                shapes[shape] = shapes.get(shape, 0) + 1
            if k == 0:
                shapes[(1, 1, width_in, 4 * width)] = shapes.get((1, 1, width_in, 4 * width), 0) + 1
            width_in = 4 * width
    shapes[(2048, 1000)] = 1
    return shapes


MODELS: dict[str, Shapes] = {
    "ResNet-50": _resnet50(),
    "BERT-large": {(1024, 1024): 96, (1024, 4096): 24, (4096, 1024): 24},
    "7B LLM": {(4096, 4096): 128, (4096, 11008): 64, (11008, 4096): 32},
}
TINY: dict[str, Shapes] = {"ResNet-50": {(1, 1, 64, 64): 1, (3, 3, 64, 64): 1, (64, 64): 1}}
