"""Claims about frozen features."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mocolayers.data.views import batch_size, batches
from mocolayers.evaluation import features as module
from mocolayers.evaluation.features import pixel_features, run_features, stage_features
from mocolayers.runtime import RunError
from mocolayers.training.monitors import knn_monitor


def test_global_averages_of_stage_four_are_the_embedding(pretrained):
    data, run = pretrained()
    encoder, rows = run.load_encoder(), data.rows("test")
    features = stage_features(encoder, data, rows, device="cpu")
    assert [f.shape[1] for f in features] == encoder.stage_channels
    with torch.no_grad():
        whole = torch.cat([encoder(x).embedding for x in batches(data, rows, torch.device("cpu"), 250)])
    assert np.array_equal(features[3], whole.numpy())


def test_spatial_pooling_keeps_places_apart(pretrained):
    data, run = pretrained()
    encoder, rows = run.load_encoder(), data.rows("test")
    whole, places = stage_features(encoder, data, rows), stage_features(encoder, data, rows, pool=2)
    for one, four in zip(whole, places, strict=True):
        assert four.shape[1] == 4 * one.shape[1]
        assert four.reshape(*one.shape, 4).mean(axis=2) == pytest.approx(one, abs=1e-5)


def test_a_stage_is_not_averaged_to_more_places_than_it_has(pretrained):
    data, run = pretrained()
    assert len(stage_features(run.load_encoder(), data, data.rows("test"), pool=2)) == 4
    with pytest.raises(ValueError, match="2 x 2 cannot be pooled to 3 x 3"):
        stage_features(run.load_encoder(), data, data.rows("test"), pool=3)


def test_encoding_leaves_the_encoder_where_and_as_it_was(pretrained):
    data, run = pretrained()
    encoder = run.load_encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    stage_features(encoder, data, data.rows("test"))
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_features_are_encoded_once_per_encoder(pretrained, monkeypatch):
    data, run = pretrained()
    first = run_features(run, data)
    monkeypatch.setattr(module, "_encoded", None)
    again = run_features(run, data)
    for stage in range(4):
        for split in ("train", "val", "test"):
            assert np.array_equal(first[stage][split], again[stage][split])


def test_features_of_changed_data_are_not_taken_for_the_old_ones(pretrained, make_data):
    data, run = pretrained()
    before = run_features(run, data)[3]["test"]
    assert not np.array_equal(run_features(run, make_data("other", seed=1))[3]["test"], before)


def test_features_of_a_replaced_encoder_are_made_anew(pretrained):
    data, run = pretrained()
    run_features(run, data)
    save_file({name: torch.zeros_like(value) for name, value in load_file(run.encoder_file).items()}, run.encoder_file)
    assert not run_features(run, data)[3]["test"].any()


def test_a_batch_of_large_images_is_small(make_data, monkeypatch):
    def largest(side):
        monkeypatch.setattr(type(data), "side", side)
        return max(len(x) for x in batches(data, np.arange(500), torch.device("cpu")))

    data = make_data(n=500)
    assert [largest(side) for side in (16, 512, 10_000)] == [250, 16, 1]


def test_large_images_are_read_a_few_at_a_time_by_whoever_looks_at_all(pretrained, watched, monkeypatch):
    """All of a data set of 512 px at once would be some ten times the memory of a machine."""
    data, run = pretrained(n=500)
    asked = watched(data)
    monkeypatch.setattr(type(data), "side", 512)
    pixel_features(data)
    knn_monitor(run.load_encoder(), data)
    assert len(asked) > 40 and max(map(len, asked)) <= 16


def test_a_device_gets_as_many_small_images_at_a_time_as_large_ones_have_pixels():
    gpu = torch.device("cuda")
    assert [batch_size(side, gpu) for side in (16, 64, 512, 10_000)] == [4096, 1024, 16, 1]


def test_the_encoder_is_read_once_and_not_copied_for_the_splits(pretrained, monkeypatch):
    data, run = pretrained()
    monkeypatch.setattr(module.copy, "deepcopy", None)
    assert len(run_features(run, data)) == 4


def test_out_of_memory_is_one_line_with_batch_and_side(pretrained, monkeypatch):
    data, run = pretrained()

    def fails(encoder, x):
        raise torch.OutOfMemoryError("in its own words")

    monkeypatch.setattr(type(run.load_encoder()), "forward", fails)
    with pytest.raises(RunError, match="out of memory: a batch of 250 images of 16 px.*--side.*--device cpu") as caught:
        run_features(run, data, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "foreign", "one number", "type of the numbers"])
def test_kept_features_that_are_damaged_are_made_again_with_a_line(pretrained, capsys, damage):
    data, run = pretrained()
    good = run_features(run, data)
    (kept,) = (run.folder / "features").iterdir()
    content = kept.read_bytes()
    if damage == "foreign":
        save_file({"weight": torch.zeros(3)}, kept)
    else:
        number = content[:-1] + bytes([content[-1] ^ 1])
        bad = {"cut": content[:50], "one number": number, "type of the numbers": content.replace(b'"F32"', b'"I32"', 1)}
        kept.write_bytes(bad[damage])
    found = run_features(run, data)
    assert f"{kept.name} is damaged" in capsys.readouterr().out
    assert all(np.array_equal(found[stage][split], good[stage][split]) for stage in range(4) for split in good[stage])
    assert kept.read_bytes() == content


def test_pixels_are_used_as_they_are_or_averaged_when_large(make_data):
    small, large = make_data("small"), make_data("large", side=56)
    found = pixel_features(small)["test"]
    assert np.allclose(found, small.images[small.rows("test")].reshape(len(found), -1) / 255)
    assert pixel_features(large)["test"].shape[1] == 28 * 28
