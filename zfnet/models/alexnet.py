"""AlexNet (Krizhevsky et al. 2012, Fig. 2), with its two groups and without, and a small one of its form."""

from dataclasses import replace

from zfnet.models.layers import Architecture, Convolution, Linear, Pool
from zfnet.models.variants import ungrouped
from zfnet.models.zfnet import ZFNET_SMALL

# 224 -> 55 -> 27 -> 27 -> 13 -> 13 -> 13 -> 13 -> 6. The paper's 55 is cuda-convnet's: the last window of conv1 hangs
# over the right and bottom edge by 3 pixels (torchvision pads 2 on every side instead, Caffe crops 227: other nets).
ALEXNET = Architecture(
    name="alexnet",
    input_px=224,
    resize_px=256,
    convolutions=(
        Convolution(name="conv1", maps=96, kernel=11, stride=4, pad_after=3, pool=Pool(), normalise="before pool"),
        Convolution(name="conv2", maps=256, kernel=5, pad=2, groups=2, pool=Pool(), normalise="before pool"),
        Convolution(name="conv3", maps=384, kernel=3, pad=1),
        Convolution(name="conv4", maps=384, kernel=3, pad=1, groups=2),
        Convolution(name="conv5", maps=256, kernel=3, pad=1, groups=2, pool=Pool()),
    ),
    linears=(Linear(name="fc6", units=4096), Linear(name="fc7", units=4096)),
    classifier="fc8",
)

ALEXNET_UNGROUPED = replace(ungrouped(ALEXNET), name="alexnet_ungrouped")

# zfnet_small with what sets AlexNet apart: normalisation before the pool, and the two groups in layers 2, 4 and 5.
ALEXNET_SMALL = replace(
    ZFNET_SMALL,
    name="alexnet_small",
    convolutions=tuple(
        replace(
            convolution,
            normalise="before pool" if convolution.normalise else None,
            groups=2 if convolution.name in ("conv2", "conv4", "conv5") else 1,
        )
        for convolution in ZFNET_SMALL.convolutions
    ),
)
