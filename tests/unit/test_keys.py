"""Keys are made once, kept from others, and a list says who may come in."""

import os

import pytest
import zmq

from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.transport.gatekeeper import Gatekeeper
from pipeline.transport.keys import fingerprint, keygen, load_engine_keys, load_learner_keys


def test_keygen_makes_a_learner_and_engines_that_fit_together(tmp_path, capsys):
    assert main(["keygen", str(tmp_path / "keys"), "--engine", "a", "--engine", "b"]) == 0
    said = capsys.readouterr().out
    assert "learner.secret" in said and "a.secret" in said and "engines.allow" in said
    learner = load_learner_keys(tmp_path / "keys")
    for name in "ab":
        engine = load_engine_keys(tmp_path / "keys", name)
        assert engine.learner_public == zmq.curve_public(learner.secret)
        assert learner.allowed.name(engine.public) == name
        assert engine.fingerprint == fingerprint(engine.public) and len(engine.fingerprint) == 16
    assert learner.allowed.name(zmq.curve_keypair()[0]) is None


def test_adding_an_engine_leaves_the_other_keys_alone(tmp_path):
    keygen(tmp_path, ["a"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    keygen(tmp_path, ["b"])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {"b.secret", "engines.allow"}
    with pytest.raises(UsageError, match="exists"):
        keygen(tmp_path, ["b"])
    assert len(load_learner_keys(tmp_path).allowed) == 2


def test_secrets_are_made_for_the_owner_only_and_refused_when_open_to_others(tmp_path):
    keygen(tmp_path, ["engine"])
    for name in ("learner.secret", "engine.secret"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        (tmp_path / name).chmod(0o640)
    with pytest.raises(UsageError, match=r"learner\.secret is open to other users \(mode 640\); run chmod 600"):
        load_learner_keys(tmp_path)
    with pytest.raises(UsageError, match=r"engine\.secret is open to other users"):
        load_engine_keys(tmp_path)
    (tmp_path / "learner.secret").chmod(0o600)
    (tmp_path / "engines.allow").chmod(0o620)
    with pytest.raises(UsageError, match=r"engines\.allow can be written by others"):
        load_learner_keys(tmp_path)
    (tmp_path / "engine.secret").chmod(0o600)
    (tmp_path / "learner.public").chmod(0o666)
    with pytest.raises(UsageError, match=r"learner\.public can be written by others"):
        load_engine_keys(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_of_another_user_is_refused(tmp_path):
    keygen(tmp_path, ["engine"])
    os.chown(tmp_path / "engine.secret", 12345, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        load_engine_keys(tmp_path)


def test_the_list_is_read_anew_and_locks_out_who_is_taken_from_it(tmp_path):
    keygen(tmp_path, ["a", "b"])
    allowed = load_learner_keys(tmp_path).allowed
    a, b = (load_engine_keys(tmp_path, name).public for name in "ab")
    path = tmp_path / "engines.allow"
    path.write_bytes(b"# only b\n" + b + b" b\n\n")
    assert allowed.name(a) is None and allowed.name(b) == "b"
    path.unlink()
    assert allowed.name(b) is None, "a list that is gone allows nobody"


def test_a_list_that_cannot_be_read_is_told_once_and_not_taken_for_a_wrong_key(tmp_path):
    keygen(tmp_path, ["engine"])
    keys, lines = load_learner_keys(tmp_path), []
    gatekeeper = Gatekeeper(zmq.Context.instance(), keys, lines.append)
    listed = (tmp_path / "engines.allow").read_bytes()
    public = load_engine_keys(tmp_path).public
    (tmp_path / "engines.allow").write_bytes(b"nonsense\n" + listed)
    assert not gatekeeper.callback("", public) and not gatekeeper.callback("", public)
    (line,) = lines
    assert line.startswith("no engine is let in: ") and "engines.allow does not hold a key" in line
    (tmp_path / "engines.allow").write_bytes(listed)
    assert gatekeeper.callback("", public)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "learner", "x" * 65])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot be a key's name"):
        keygen(tmp_path / "keys", [name])


def test_what_is_no_key_is_refused_with_its_path(tmp_path):
    with pytest.raises(UsageError, match=r"learner\.secret cannot be read .*rollahead keygen"):
        load_learner_keys(tmp_path)
    keygen(tmp_path, ["engine"])
    (tmp_path / "learner.public").write_text("short")
    with pytest.raises(UsageError, match=r"learner\.public does not hold a key"):
        load_engine_keys(tmp_path)
