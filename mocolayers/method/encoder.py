"""`StagedResNet`: torchvision's ResNet that also returns what each of its four stages saw."""

from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYOUTS = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


class Encoded(NamedTuple):
    """What a `StagedResNet` returns for a batch of B images."""

    stages: list[Tensor]  # four maps, (B, C_l, H_l, W_l) each, after the last residual addition and ReLU of the stage
    embedding: Tensor  # (B, C_4), the global average of the last stage


class StagedResNet(ResNet):
    """torchvision's ResNet with a choice of width and stem, without its classifier.

    The names of its parameters are torchvision's, so a saved `StagedResNet("resnet50", width=64, stem="imagenet")`
    loads into `torchvision.models.resnet50` with `strict=False`; only `fc` is missing.

    Args:
        layout: "resnet10", "resnet18", "resnet34" or "resnet50".
        width: channels of the first stage's basic block; 64 is the standard.
        stem: "small" is one 3x3 convolution at full resolution, for images up to about 64 px;
            "imagenet" is the standard 7x7 convolution with stride 2 and max-pooling.
        in_channels: 1 for X-rays, 3 for colour images.
        zero_init_residual: start every residual branch at zero.

    On processors with AVX512-BF16 and without AMX, bf16 with a width under 16 damages memory (a fault of oneDNN in the
    gradient of strided 1x1 convolutions, with fewer images than threads): train so narrow ones in fp32.

    Source: He et al. 2016 (1512.03385); the small stem is the one used for CIFAR by SimCLR (2002.05709, appendix B.9).
    """

    def __init__(
        self,
        layout: str = "resnet18",
        width: int = 64,
        stem: str = "imagenet",
        in_channels: int = 3,
        zero_init_residual: bool = False,
    ) -> None:
        block, depths = LAYOUTS[layout]
        super().__init__(block, depths, num_classes=1)
        if width != 64:
            self.inplanes, self.bn1 = width, nn.BatchNorm2d(width)
            for stage, depth in enumerate(depths):
                layer = self._make_layer(block, width * 2**stage, depth, stride=1 if stage == 0 else 2)
                setattr(self, f"layer{stage + 1}", layer)
        if stem == "small":
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        elif stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            raise ValueError(f"stem {stem!r}: choose 'small' (images up to about 64 px) or 'imagenet'")
        self.fc = nn.Identity()
        self.stage_channels = [width * 2**stage * block.expansion for stage in range(4)]
        self.dim = self.stage_channels[-1]
        for module in self.modules():  # as torchvision, again because the stem and the stages may be new
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.bn2.weight if isinstance(module, BasicBlock) else module.bn3.weight)

    def forward(self, x: Tensor) -> Encoded:
        """Encode a batch of images (B, C, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        return Encoded(stages, self.avgpool(x).flatten(1))  # embedding: (B, C_4)
