"""Small networks for the tests: the papers' geometry at few maps, and random chains with integer weights."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

from zfnet.models import build


def zfnet_like(maps=(6, 8, 10, 10, 8), normalisation=True, classes=None, input_px=224) -> nn.Sequential:
    """ZFNet in form A (PAPERS 1.2): zero-pad right and bottom, ceil-mode pools; a few maps a layer."""
    norm = (lambda: nn.LocalResponseNorm(5, 1e-2, 0.75, 2)) if normalisation else nn.Identity
    layers = nn.Sequential()
    steps = [
        ("pad", nn.ZeroPad2d((0, 1, 0, 1))),
        ("conv1", nn.Conv2d(3, maps[0], 7, 2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("norm1", norm()),
        ("conv2", nn.Conv2d(maps[0], maps[1], 5, 2)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("norm2", norm()),
        ("conv3", nn.Conv2d(maps[1], maps[2], 3, padding=1)),
        ("relu3", nn.ReLU()),
        ("conv4", nn.Conv2d(maps[2], maps[3], 3, padding=1)),
        ("relu4", nn.ReLU()),
        ("conv5", nn.Conv2d(maps[3], maps[4], 3, padding=1)),
        ("relu5", nn.ReLU()),
        ("pool5", nn.MaxPool2d(3, 2)),
    ]
    if classes:
        side = nn.Sequential(*(m for _, m in steps))(torch.zeros(1, 3, input_px, input_px)).shape[-1]
        steps += [("flat", nn.Flatten()), ("fc6", nn.Linear(maps[4] * side * side, 12)), ("relu6", nn.ReLU())]
        steps += [("drop6", nn.Dropout()), ("fc8", nn.Linear(12, classes))]
    for name, module in steps:
        layers.add_module(name, module)
        if isinstance(module, nn.Conv2d | nn.Linear):  # torch's default fades the image away over eight layers
            nn.init.kaiming_normal_(module.weight)
    return layers.eval()


def overfeat(name: str, classes: int = 5) -> nn.Sequential:
    """One of OverFeat's networks in float64, with weights under which all layers fire."""
    torch.manual_seed(0)
    network = build(name, classes).double().eval()
    for layer in network.children():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return network


def torchvision_network(name: str, seed: int) -> nn.Module:
    """A torchvision network with random weights, and a small classifier where the real one is 100 M weights."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"aux_logits": False} if name == "googlenet" else {}))
    if name.startswith(("vgg", "alexnet")):
        units = next(m.in_features for m in model.classifier if isinstance(m, nn.Linear))
        model.classifier = nn.Sequential(nn.Linear(units, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 9))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.eval()


class Branches(nn.Module):
    """Residual sum, concatenation, a shared in-place ReLU, functional and method forms, pools of both sorts."""

    def __init__(self, maps=4, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, maps, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(maps)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.left = nn.Conv2d(maps, maps, 3, padding=1, bias=False)
        self.right = nn.Conv2d(maps, maps, 5, padding=2, groups=2)
        self.shrink = nn.Conv2d(2 * maps, maps, 1, stride=2)
        self.down = nn.Conv2d(2 * maps, maps, 3, stride=2, padding=1)
        self.last = nn.Conv2d(maps, maps, (3, 2), padding=(1, 0), dilation=(1, 2))
        self.fc = nn.Linear(maps, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        nn.init.uniform_(self.bn.running_mean, -0.2, 0.2)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        y = torch.cat([F.relu(self.left(x)), self.right(x).relu()], dim=1)
        z = self.relu(self.shrink(y))
        z += self.down(y)
        z = F.avg_pool2d(torch.relu(z), 3, stride=1, padding=1, count_include_pad=False)
        z = self.relu(self.last(z))
        z = F.dropout(F.adaptive_avg_pool2d(z, 1), training=self.training)
        return self.fc(z.view(z.size(0), -1))


@st.composite
def chains(draw, pools=("max",), sizes=(9, 20), depth=(1, 4)) -> tuple[nn.Sequential, tuple[int, int, int]]:
    """Random conv / ReLU / pool chains that end in a convolution, and an image shape; integer weights, float64."""
    shape = (draw(st.sampled_from([1, 2, 4])), draw(st.integers(*sizes)), draw(st.integers(*sizes)))
    probe, steps = torch.zeros(1, *shape, dtype=torch.float64), []
    for index in range(draw(st.integers(*depth))):
        kind = draw(st.sampled_from(["conv", *pools])) if index else "conv"
        step = _step(draw, kind, probe.shape[1])
        try:
            probe_next = step(probe)
        except RuntimeError:  # no cell is left: end the chain here
            break
        if 0 in probe_next.shape or not probe_next.isfinite().all():  # -inf: a dilated pool window beside the map
            break
        probe = probe_next
        steps.append(step)
        if kind == "conv":
            steps.append(nn.ReLU())
    last = nn.Conv2d(probe.shape[1], 2, 1).double()
    steps += [last, nn.ReLU()]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for parameter in nn.Sequential(*steps).parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return nn.Sequential(*steps).eval(), shape


def _step(draw, kind: str, maps: int) -> nn.Module:
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, stride = pair(1, 4), pair(1, 3)
    if kind == "conv":
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if maps % g == 0]))
        out = draw(st.sampled_from([2, 4])) if groups < 4 else 4
        conv = nn.Conv2d(maps, out, kernel, stride, pair(0, 2), pair(1, 2), groups, bias=draw(st.booleans()))
        return conv.double()
    padding = tuple(min(draw(st.integers(0, 2)), k // 2) for k in kernel)
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding, pair(1, 2), ceil_mode=draw(st.booleans()))
    return nn.AvgPool2d(kernel, stride, padding, draw(st.booleans()), draw(st.booleans()))


def error(got: Tensor, reference: Tensor) -> float:
    """DESIGN section 4: max |difference| / max |reference|."""
    scale = reference.abs().max().item()
    difference = (got - reference).abs().max().item()
    return difference / scale if scale else difference
