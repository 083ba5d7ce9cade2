"""OverFeat (Sermanet et al. 2014), fast (Tab. 1) and accurate (Tab. 3), and a small one of the form of each.

Pools do not overlap, nothing is normalised, and the layers without maps are convolutions: the networks slide over
images of any larger size (`zfnet.dense`). Every side below is exact, no pool drops a cell.
"""

from zfnet.models.layers import Architecture, Convolution, Linear, Pool


def _pool(cells: int) -> Pool:
    """Windows side by side. What does not fill one at the end is dropped, which offsets count on (Sec. 3.3)."""
    return Pool(kernel=cells, stride=cells, ceil=False)


# 231 -> 56 -> 28 -> 24 -> 12 -> 12 -> 12 -> 12 -> 6. The paper prints 24 as the input of layer 2; it is the output of
# its convolution, and 28 x 28 cells enter it.
OVERFEAT_FAST = Architecture(
    name="overfeat_fast",
    input_px=231,
    resize_px=256,
    convolutions=(
        Convolution(name="conv1", maps=96, kernel=11, stride=4, pool=_pool(2)),
        Convolution(name="conv2", maps=256, kernel=5, pool=_pool(2)),
        Convolution(name="conv3", maps=512, kernel=3, pad=1),
        Convolution(name="conv4", maps=1024, kernel=3, pad=1),
        Convolution(name="conv5", maps=1024, kernel=3, pad=1, pool=_pool(2)),
    ),
    linears=(Linear(name="fc6", units=3072), Linear(name="fc7", units=4096)),
    classifier="fc8",
    sliding=True,
)

# 221 -> 108 -> 36 -> 30 -> 15 -> 15 -> 15 -> 15 -> 15 -> 5.
OVERFEAT_ACCURATE = Architecture(
    name="overfeat_accurate",
    input_px=221,
    resize_px=256,
    convolutions=(
        Convolution(name="conv1", maps=96, kernel=7, stride=2, pool=_pool(3)),
        Convolution(name="conv2", maps=256, kernel=7, pool=_pool(2)),
        Convolution(name="conv3", maps=512, kernel=3, pad=1),
        Convolution(name="conv4", maps=512, kernel=3, pad=1),
        Convolution(name="conv5", maps=1024, kernel=3, pad=1),
        Convolution(name="conv6", maps=1024, kernel=3, pad=1, pool=_pool(3)),
    ),
    linears=(Linear(name="fc7", units=4096), Linear(name="fc8", units=4096)),
    classifier="fc9",
    sliding=True,
)

# 69 -> 32 -> 16 -> 12 -> 6 -> 6 -> 6 -> 6 -> 3; windows are 16 px apart, 8 with all offsets of the last pool.
OVERFEAT_FAST_SMALL = Architecture(
    name="overfeat_fast_small",
    input_px=69,
    resize_px=76,
    convolutions=(
        Convolution(name="conv1", maps=32, kernel=7, stride=2, pool=_pool(2)),
        Convolution(name="conv2", maps=64, kernel=5, pool=_pool(2)),
        Convolution(name="conv3", maps=96, kernel=3, pad=1),
        Convolution(name="conv4", maps=128, kernel=3, pad=1),
        Convolution(name="conv5", maps=128, kernel=3, pad=1, pool=_pool(2)),
    ),
    linears=(Linear(name="fc6", units=384, dropout=0.2), Linear(name="fc7", units=512, dropout=0.2)),
    classifier="fc8",
    sliding=True,
)

# 70 -> 66 -> 22 -> 18 -> 9 -> 9 -> 9 -> 9 -> 9 -> 3; windows are 18 px apart, 6 with all offsets of the last pool.
OVERFEAT_ACCURATE_SMALL = Architecture(
    name="overfeat_accurate_small",
    input_px=70,
    resize_px=78,
    convolutions=(
        Convolution(name="conv1", maps=32, kernel=5, pool=_pool(3)),
        Convolution(name="conv2", maps=64, kernel=5, pool=_pool(2)),
        Convolution(name="conv3", maps=96, kernel=3, pad=1),
        Convolution(name="conv4", maps=96, kernel=3, pad=1),
        Convolution(name="conv5", maps=128, kernel=3, pad=1),
        Convolution(name="conv6", maps=128, kernel=3, pad=1, pool=_pool(3)),
    ),
    linears=(Linear(name="fc7", units=512, dropout=0.2), Linear(name="fc8", units=512, dropout=0.2)),
    classifier="fc9",
    sliding=True,
)

NETWORKS = (OVERFEAT_FAST, OVERFEAT_ACCURATE, OVERFEAT_FAST_SMALL, OVERFEAT_ACCURATE_SMALL)
