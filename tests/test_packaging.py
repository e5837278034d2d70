"""What people install: a wheel, an sdist, an editable or a bare checkout, and nothing but `kvpolicy` each time.

Everything is built from a copy of the checkout, so that neither a stale build folder nor a parallel test gets in. No
network: the environments made here are new, and see this one's packages through a .pth file.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kvpolicy

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def sh(*command: object, cwd: Path | str = "/", **settings: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


def sources(folder: Path) -> set[str]:
    """Files that a user's installation must hold, as paths inside site-packages."""
    code = (path for part in ("kvpolicy", "patches", "policies") for path in (folder / part).rglob("*"))
    files = {path.relative_to(folder).as_posix() for path in code if path.is_file() and "__pycache__" not in path.parts}
    return {name if name.startswith("kvpolicy/") else f"kvpolicy/{name}" for name in files}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "checkout", ignore=LEFT_BEHIND))


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    sh(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout)
    return folder


class Environment:
    """A new virtual environment that sees this one's packages, but not its kvpolicy: their .pth files are not read."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site = Path(sh(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.before = self.importable()

    def importable(self) -> set[str]:
        return {path.name for path in self.site.iterdir() if not path.name.endswith((".dist-info", ".pth"))}

    def install(self, *what: object) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps"]
        sh(*pip, "--no-build-isolation", "--ignore-installed", *what)

    def run(self, code: str, cwd: Path | str = "/") -> str:
        return sh(self.python, "-c", code, cwd=cwd)

    def listed(self) -> dict[str, list[str]]:
        """Names that the installed command lists, by kind."""
        found = json.loads(sh(self.python.with_name("kvpolicy"), "list", "--json"))
        return {kind: [item["name"] for item in found[kind]] for kind in ("policies", "models")}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def shipped(folder: Path) -> dict[str, set[str]]:
    return {
        "policies": {path.stem for path in (folder / "policies").glob("**/*.yaml")},
        "models": {path.stem for path in (folder / "patches").glob("[!_]*.py")},
    }


def test_the_wheel_holds_every_file_and_one_name(dist: Path, checkout: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    info = {name for name in names if name.split("/")[0] == f"kvpolicy-{kvpolicy.__version__}.dist-info"}
    assert {name.split("/")[0] for name in names - info} == {"kvpolicy"}
    assert names - info == sources(checkout)
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_sdist_holds_what_a_packager_needs(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    top = f"kvpolicy-{kvpolicy.__version__}/"
    with tarfile.open(archive) as content:
        names = {name.removeprefix(top) for name in content.getnames()}
    assert {"pyproject.toml", "setup.py", "constraints.txt", "Makefile", "tests/test_packaging.py"} <= names
    assert {f"policies/{name}.yaml" for name in shipped(ROOT)["policies"]} <= names
    assert {f"patches/{name}.py" for name in shipped(ROOT)["models"]} <= names


def test_an_installed_wheel_works_from_anywhere(dist: Path, checkout: Path, environment: Environment) -> None:
    environment.install(*dist.glob("*.whl"))
    assert environment.importable() - environment.before == {"kvpolicy"}
    listed = environment.listed()
    for kind, names in shipped(checkout).items():
        assert set(listed[kind]) >= names
    # In a checkout the local kvpolicy/ shadows the installed one, and must find its two outer packages all the same.
    code = "import kvpolicy, kvpolicy.patches, kvpolicy.policies; print(kvpolicy.__file__)"
    assert Path(environment.run(code, cwd=checkout).strip()).is_relative_to(checkout)


def test_an_editable_install_sees_new_files(checkout: Path, tmp_path: Path, environment: Environment) -> None:
    copy = Path(shutil.copytree(checkout, tmp_path / "checkout", ignore=LEFT_BEHIND))
    environment.install("--editable", copy)
    leaked = {name for name in environment.importable() - environment.before if not name.startswith("__editable__")}
    assert leaked <= {"__pycache__"}
    environment.run(
        "from importlib.util import find_spec\n"
        "for name in ('patches', 'policies', 'tests'): assert find_spec(name) is None, name"
    )
    (copy / "policies" / "brand-new.yaml").write_text("kvpolicy: 1\nname: brand-new\npools: {all: {admit: all}}\n")
    listed = environment.listed()
    for kind, names in shipped(copy).items():
        assert set(listed[kind]) >= names
    assert "brand-new" in listed["policies"]


def test_a_checkout_works_uninstalled(checkout: Path) -> None:
    listed = json.loads(sh(sys.executable, "-m", "kvpolicy", "list", "--json", cwd=checkout))
    assert {item["name"] for item in listed["policies"]} >= shipped(checkout)["policies"]
