"""Published versions: complete or invisible, checked, numbered once."""

import errno
import json
import resource
import shutil

import pytest
import torch

from pipeline.failpoints import arm
from pipeline.weights import FilesystemFollower, FilesystemPublisher, WeightsError
from pipeline.weights.filesystem import replace_tensors, save_tensors


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 3, "torch_dtype": "bfloat16"}')
    return folder


def _publisher(tmp_path, model_folder, keep=2):
    return FilesystemPublisher(tmp_path / "weights", keep, model_folder)


def test_a_follower_reads_what_was_published(tmp_path, model_folder):
    from safetensors.torch import load_file

    tensors = {"w": torch.randn(3, 4)}
    publication = _publisher(tmp_path, model_folder).publish(tensors, step=7)
    folder, found = FilesystemFollower(tmp_path / "weights").fetch(publication.version)
    assert found == publication and (found.version, found.timeline, found.step) == (0, 1, 7)
    assert torch.equal(load_file(folder / "model.safetensors")["w"], tensors["w"])
    assert json.loads((folder / "config.json").read_text()) == {"vocab_size": 3, "dtype": "float32"}


def test_numbers_are_never_reused_even_after_every_version_is_gone(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    for step in range(3):
        publisher.publish({"w": torch.zeros(1)}, step)
    for folder in (tmp_path / "weights").glob("v*"):
        shutil.rmtree(folder)
    assert _publisher(tmp_path, model_folder).publish({"w": torch.zeros(1)}, 0).version == 3


def test_a_restart_begins_a_new_timeline(tmp_path, model_folder):
    assert _publisher(tmp_path, model_folder).publish({"w": torch.zeros(1)}, 5).timeline == 1
    assert _publisher(tmp_path, model_folder).publish({"w": torch.zeros(1)}, 2).timeline == 2


def test_a_half_written_version_is_invisible_and_swept_away(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    publisher.publish({"w": torch.zeros(1)}, 0)
    (tmp_path / "weights" / ".writing-1").mkdir()
    assert FilesystemFollower(tmp_path / "weights").newest() == 0
    _publisher(tmp_path, model_folder)
    assert not (tmp_path / "weights" / ".writing-1").exists()


def test_a_corrupt_version_is_refused(tmp_path, model_folder):
    _publisher(tmp_path, model_folder).publish({"w": torch.zeros(100)}, 0)
    path = tmp_path / "weights" / "v0" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="checksum"):
        FilesystemFollower(tmp_path / "weights").fetch(0, patience=0.2)


def test_a_deleted_version_gives_the_newest_instead(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    for step in range(4):
        publisher.publish({"w": torch.zeros(1)}, step)
    publisher.retire(oldest_in_use=None)
    follower = FilesystemFollower(tmp_path / "weights")
    assert sorted(path.name for path in (tmp_path / "weights").glob("v*")) == ["v2", "v3"]
    assert follower.fetch(0)[1].version == 3


def test_versions_a_live_engine_still_needs_are_spared(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    for step in range(5):
        publisher.publish({"w": torch.zeros(1)}, step)
    publisher.retire(oldest_in_use=1)
    assert sorted(path.name for path in (tmp_path / "weights").glob("v*")) == ["v1", "v2", "v3", "v4"]


def test_a_stuck_engine_does_not_pin_versions_for_ever(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    for step in range(20):
        publisher.publish({"w": torch.zeros(1)}, step)
        publisher.retire(oldest_in_use=-1)
    assert len(list((tmp_path / "weights").glob("v*"))) == 4 * publisher.keep


def test_a_full_disk_is_an_error_that_changes_nothing_and_goes_away(tmp_path, model_folder):
    publisher = _publisher(tmp_path, model_folder)
    publisher.publish({"w": torch.zeros(1)}, 0)
    arm("publish.written=enospc*1")
    try:
        with pytest.raises(OSError) as error:
            publisher.publish({"w": torch.zeros(1)}, 1)
    finally:
        arm("")
    assert error.value.errno == errno.ENOSPC
    assert FilesystemFollower(tmp_path / "weights").newest() == 0
    assert publisher.publish({"w": torch.zeros(1)}, 1).version == 1


def test_a_file_of_tensors_takes_another_s_place_once_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.safetensors", []
    path.write_bytes(b"before")
    syncs = "pipeline.weights.filesystem.sync"
    monkeypatch.setattr(syncs, lambda at: seen.append((at, path.read_bytes() == b"before")))
    replace_tensors({"a": torch.zeros(3)}, path)
    assert seen == [(tmp_path / ".a.safetensors.new", True), (tmp_path, False)]
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_do_not_fit_on_the_disk_raise_as_any_other_file_does(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as error:
            save_tensors({"w": torch.zeros(10_000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
