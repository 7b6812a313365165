"""Claims about the staged ResNet."""

import re

import pytest
import torch
import torchvision

from mocolayers.method.encoder import StagedResNet
from mocolayers.notebook.series import HOME
from mocolayers.training.runs import save_weights


@pytest.mark.parametrize("layout", ["resnet18", "resnet50"])
def test_a_full_encoder_is_torchvisions(layout):
    torch.manual_seed(0)
    ours = StagedResNet(layout, 64, "imagenet").eval()
    theirs = getattr(torchvision.models, layout)()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    theirs.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(x), ours(x).embedding, atol=1e-5)


@pytest.mark.parametrize("layout, width, last", [("resnet10", 16, 128), ("resnet18", 8, 64), ("resnet50", 16, 512)])
def test_stages_have_the_channels_and_sides_they_say(layout, width, last):
    encoder = StagedResNet(layout, width, "small", in_channels=1)
    encoded = encoder(torch.rand(2, 1, 32, 32))
    assert [s.shape[1] for s in encoded.stages] == encoder.stage_channels
    assert [s.shape[2] for s in encoded.stages] == [32, 16, 8, 4]
    assert encoded.embedding.shape == (2, last) and encoder.dim == last
    assert torch.allclose(encoded.stages[3].mean(dim=(2, 3)), encoded.embedding, atol=1e-6)


@pytest.mark.parametrize("layout, last", [("resnet10", "bn2"), ("resnet50", "bn3")])
def test_residual_branches_start_at_zero_if_asked(layout, last):
    for zero in (False, True):
        encoder = StagedResNet(layout, 8, "small", zero_init_residual=zero)
        assert all(getattr(block, last).weight.eq(0).all() == zero for block in (encoder.layer1[0], encoder.layer4[0]))


def test_an_unknown_stem_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose 'small' .* or 'imagenet'"):
        StagedResNet("resnet10", 8, "tiny")


def test_a_saved_encoder_loads_into_torchvision_as_the_guide_says(tmp_path):
    torch.manual_seed(0)
    ours = StagedResNet("resnet18", 64, "imagenet").eval()
    save_weights(ours, tmp_path / "encoder.safetensors")
    guide = (HOME / "SCALING.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", guide[guide.index("## Your encoder elsewhere") :], re.S)[1]
    assert len(list(filter(None, lines.splitlines()))) == 5, "two imports and three lines"
    names = {}
    exec(lines.replace("resnet50", "resnet18").replace("runs/KEY", str(tmp_path)), names)
    theirs = names["model"].eval()
    theirs.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x).embedding, atol=1e-5)
