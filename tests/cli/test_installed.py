"""What is built and installed works far from the repository: package, command and all of conf/."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT
from helpers.waiting import LIMIT

PARTS = ("elastic", "conf", "pyproject.toml", "README.md", "LICENSE")


def call(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a command that must succeed, with only `path` to import from."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    call("-m", "pip", arguments[0], *offline, *arguments[1:], cwd=cwd)


def sdist(source: Path, to: Path) -> Path:
    """The source distribution of `source`."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(to)!r})"
    call("-c", code, cwd=source)
    [path] = to.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Built from a checkout, and from a source distribution of it; nothing is left in ours."""
    base = tmp_path_factory.mktemp("built")
    checkout = base / "checkout"
    checkout.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, checkout / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, checkout)
    pip("wheel", "-w", base / "first", checkout, cwd=base)
    pip("wheel", "-w", base / "second", sdist(checkout, base / "sdist"), cwd=base)
    [first], [second] = (base / "first").glob("*.whl"), (base / "second").glob("*.whl")
    return first, second


@pytest.fixture(scope="module")
def site(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheels[1], cwd=target)
    return target


def test_wheels_hold_every_module_and_every_file_of_conf(wheels: tuple[Path, Path]) -> None:
    expected = {
        str(path.relative_to(ROOT)) for path in (ROOT / "elastic").rglob("*.py") if path.is_file()
    } | {f"elastic/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.*")}
    assert "elastic/conf/hydra/launcher/slurm.yaml" in expected
    for wheel in wheels:
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert names == expected


def test_the_command_is_installed(site: Path, tmp_path: Path) -> None:
    """As pip writes it, help and versions included, and without torch."""
    command = site / "bin" / "elastic"
    assert call(command, "--help", cwd=tmp_path, path=site).startswith("elastic COMMAND")
    assert call("-m", "elastic", "--help", cwd=tmp_path, path=site).startswith("elastic COMMAND")
    first = call(command, "train", "--version", cwd=tmp_path, path=site).splitlines()[0]
    assert first.startswith("elastic ") and str(site) in first
    code = (
        "import sys, elastic.cli.main as m\n"
        "for words in (['--help'], ['--version'], ['train', '--help']):\n"
        "    sys.argv = ['elastic', *words]; m.main()\n"
        "print('torch' in sys.modules)"
    )
    assert call("-c", code, cwd=tmp_path, path=site).splitlines()[-1] == "False"


def test_users_bring_files_of_their_own(site: Path, tmp_path: Path) -> None:
    """An experiment beside ours, and a whole file in place of train.yaml."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "wide.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /space: tiny_heterogeneous\n"
        "name: wide\nseed: 5\n"
    )
    (tmp_path / "mine" / "other.yaml").write_text("defaults: [train, _self_]\nseed: 9\n")
    train = [site / "bin" / "elastic", "train", "--cfg", "job", "--config-dir", "mine"]
    wide = yaml.safe_load(call(*train, "experiment=wide", cwd=tmp_path, path=site))
    assert (wide["name"], wide["seed"]) == ("wide", 5) and wide["space"]["heterogeneous"]
    other = yaml.safe_load(call(*train, "--config-name", "other", cwd=tmp_path, path=site))
    assert (other["name"], other["seed"]) == ("tiny", 9)


def test_it_trains(site: Path, tmp_path: Path) -> None:
    """From a folder with nothing in it."""
    call(site / "bin" / "elastic", "train", "debug=one_step", cwd=tmp_path, path=site)
    load = "elastic.load('runs/debug/elastic', 'small').num_parameters()"
    code = f"import elastic; print(elastic.__file__, {load})"
    file, count = call("-c", code, cwd=tmp_path, path=site).split()
    assert file.startswith(str(site)) and int(count) > 0
