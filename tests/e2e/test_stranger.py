"""What a stranger does with the README: install, demo, report, own drafter and reward, two shells, a kill.

The package is built and installed from its wheel. Its dependencies are those of the environment that runs the tests: to
download torch again would test somebody else's server.
"""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL
from tests.e2e.runs import ROOT, free_address, kill, rows, settings, trained, wait_until

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of what git knows, with wheel and sdist in dist/."""
    source = tmp_path_factory.mktemp("source")
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    (source / "dist").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return source / "dist"


@pytest.fixture(scope="module")
def shell(built, tmp_path_factory, cache):
    """Runs a line in a folder of its own, with nothing but the wheel installed; `start` does not wait for the end."""
    home = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
    (wheel,) = built.glob("*.whl")
    pip = [home / "env/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (packages,) = (home / "env/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for name, block in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", README, re.DOTALL):
        (home / f"{name}.py").write_text(block)
    environment = {
        "PATH": f"{home / 'env/bin'}:/usr/bin:/bin", "HOME": str(home), "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def start(line: str, *more: str) -> subprocess.Popen:
        log = (home / "log").open("ab")
        return subprocess.Popen([*shlex.split(line), *more], cwd=home, env=environment, stdout=log, stderr=log)

    def run(line: str, *more: str) -> str:
        words = [*shlex.split(line), *more]
        done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.home, run.start = home, start
    return run


def said(command: str) -> str:
    """The README's own line that begins so, without what it says about it."""
    (line,) = re.findall(rf"^    ({re.escape(command)}.*?)(?:\s{{2,}}#.*| \.\.\.)?$", README, re.MULTILINE)[:1]
    return line


def test_wheel_and_sdist_hold_what_is_needed(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "pipeline/config/embedded.toml", "pipeline/telemetry/report/report.js", "learner/recipes/grpo.toml",
        "drafters/suffix_automaton.py",
    } <= inside  # fmt: skip
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/"))]
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("/README.md") for name in names) and any("report.css" in name for name in names)


def test_the_installed_command_helps_before_torch_is_loaded(shell):
    assert "examples:" in shell("rollahead --help")
    code = "import sys, pipeline.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    shell(f'{shell.home}/env/bin/python -c "{code}"')
    assert str(shell.home) in shell(f'{shell.home}/env/bin/python -c "import pipeline; print(pipeline.__file__)"')


def test_demo_and_report(shell):
    shell(said("rollahead run --out runs/demo"), *settings(**SMALL, run__steps=3))
    out = shell(said("rollahead report runs/demo"))
    assert "report.html" in out
    report = (shell.home / "runs/demo/report.html").read_text()
    assert "Plotly" in report and "What is" in report
    assert (shell.home / "runs/demo/trace.json").exists() and any((shell.home / "runs/demo/tensorboard").iterdir())


def test_own_drafter_reward_task_and_objective(shell):
    own = [said(f"rollahead run --set {key}") for key in ("engine.drafter=my", "task.reward=my", "task.kind=my")]
    own.append(said("rollahead run --set 'objective.gates"))
    words = [word for line in own for word in shlex.split(line)[2:]]
    shell("rollahead run", *words, *settings(**SMALL, run__steps=2), "--out", "runs/own")
    last = rows(shell.home / "runs/own")[-1]
    assert last["step"] == 2 and last["drafters"]["repeat-last"]["drafted"] > 0
    assert 0 < last["reward_mean"] < 1, "brevity"
    assert "certain_tokens/kept" in last["extra"]


def test_two_shells_a_kill_and_the_same_command_again(shell):
    options = dict(SMALL, run__steps=6, run__out="runs/two", learner__checkpoint_every=2, transport__lease_seconds=5)
    line = ["--dry-run", *settings(**options, transport__address=free_address())]
    (shell.home / "c.toml").write_text(shell("rollahead run", *line))
    learner, engine = shell.start(said("rollahead learner")), shell.start(said("rollahead engine"))
    try:
        run: Path = shell.home / "runs/two"
        wait_until(lambda: len(rows(run)) >= 3, 300, "third step", learner, engine)
        kill(learner)
        learner = shell.start(said("rollahead learner"))
        assert learner.wait(300) == 0 and engine.wait(60) == 0
    finally:
        for process in (learner, engine):
            if process.poll() is None:
                kill(process)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    ids = trained(run)
    assert len(ids) == len(set(ids)) == 6 * 16
