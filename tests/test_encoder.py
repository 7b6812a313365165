"""Claims about the staged ResNet."""

import re

import pytest
import torch
import torchvision

from mocolayers.method.encoder import StagedResNet
from mocolayers.notebook.series import HOME
from mocolayers.training.pretrain import gather_batch_norm_statistics
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


def test_gathered_statistics_are_those_of_the_images():
    encoder = StagedResNet("resnet10", 8, "small", in_channels=1)
    batches = [torch.rand(16, 1, 16, 16) + 2 for _ in range(3)]
    gather_batch_norm_statistics(encoder, batches)
    with torch.no_grad():
        expected = torch.cat([encoder.conv1(b) for b in batches]).mean(dim=(0, 2, 3))
    assert torch.allclose(encoder.bn1.running_mean, expected, atol=1e-4)
    assert not encoder.training and encoder.bn1.momentum == 0.1


def test_a_saved_encoder_loads_into_torchvision_as_the_readme_says(tmp_path):
    torch.manual_seed(0)
    ours = StagedResNet("resnet18", 64, "imagenet").eval()
    save_weights(ours, tmp_path / "encoder.safetensors")
    readme = (HOME / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", readme[readme.index("### Your encoder elsewhere") :], re.S)[1]
    assert len(list(filter(None, lines.splitlines()))) == 5, "two imports and three lines"
    names = {}
    exec(lines.replace("resnet50", "resnet18").replace("runs/KEY", str(tmp_path)), names)
    theirs = names["model"].eval()
    theirs.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x).embedding, atol=1e-5)
