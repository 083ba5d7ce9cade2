"""ZFNet (Zeiler and Fergus 2014, Fig. 3), and a small one of its form that learns in minutes on a laptop."""

from zfnet.models.layers import Architecture, Convolution, Linear, Pool

# 224 -> 110 -> 55 -> 26 -> 13 -> 13 -> 13 -> 13 -> 6. The paper's sizes are those of cuda-convnet, which let
# the last window of a convolution and of a pool hang over the right and bottom edge: hence pad_after, and the
# pools' ceil.
ZFNET = Architecture(
    name="zfnet",
    input_px=224,
    resize_px=256,
    convolutions=(
        Convolution(name="conv1", maps=96, kernel=7, stride=2, pad_after=1, pool=Pool(), normalise="after pool"),
        Convolution(name="conv2", maps=256, kernel=5, stride=2, pool=Pool(), normalise="after pool"),
        Convolution(name="conv3", maps=384, kernel=3, pad=1),
        Convolution(name="conv4", maps=384, kernel=3, pad=1),
        Convolution(name="conv5", maps=256, kernel=3, pad=1, pool=Pool()),
    ),
    linears=(Linear(name="fc6", units=4096), Linear(name="fc7", units=4096)),
    classifier="fc8",
)

# 64 -> 30 -> 15 -> 15 -> 7 -> 7 -> 7 -> 7 -> 3: the second stride of ZFNet's two would leave maps of 2 cells.
ZFNET_SMALL = Architecture(
    name="zfnet_small",
    input_px=64,
    resize_px=72,
    convolutions=(
        Convolution(name="conv1", maps=32, kernel=7, stride=2, pad_after=1, pool=Pool(), normalise="after pool"),
        Convolution(name="conv2", maps=64, kernel=5, pad=2, pool=Pool(), normalise="after pool"),
        Convolution(name="conv3", maps=96, kernel=3, pad=1),
        Convolution(name="conv4", maps=96, kernel=3, pad=1),
        Convolution(name="conv5", maps=64, kernel=3, pad=1, pool=Pool()),
    ),
    linears=(Linear(name="fc6", units=512, dropout=0.2), Linear(name="fc7", units=512, dropout=0.2)),
    classifier="fc8",
)
