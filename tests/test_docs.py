"""What README and docs show runs as it stands."""

import pathlib
import re
import shlex
import warnings

import pytest
import services
from commands import run

from sdpoint_jax.cli import config_flag, main
from sdpoint_jax.config import to_dict
from sdpoint_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = {"train.py": "train", "evaluate.py": "evaluate"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S)


def commands(page):
    """The project's own commands in the shell blocks of a page."""
    lines = (line for block in blocks(page, "sh") for line in block.splitlines())
    words = (shlex.split(line, comments=True) for line in lines)
    return [line[1:] for line in words if line[:1] == ["python"]]


@pytest.fixture
def digits(swept, tmp_path, monkeypatch):
    """A folder with what `make demo` leaves, in small."""
    record = {"config": to_dict(swept.experiment.config), "step": 30, "class_names": list("0123456789")}
    checkpoint.save(tmp_path / "runs/digits/checkpoints/30", {"params": swept.params}, record)
    (tmp_path / "runs/digits/sweep").symlink_to(swept.folder)
    (tmp_path / "runs/finetuned").symlink_to(tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)


# The net of this page, and what the page does with it, is tested in tests/test_your_net.py.
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "docs/your_net.md"])
def test_the_python_of_a_page_runs(page, digits):
    namespace = {}
    for block in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # Of ml_collections.
def test_the_commands_of_a_page_are_understood(page):
    for script, *arguments in commands(page):
        config, others = config_flag.split_arguments(arguments)
        if script == "-m":
            assert others.pop(0) == "sdpoint_jax"
            main._parser().parse_args(others)
        elif script in SCRIPTS:
            main._add_command(main.Parser(), SCRIPTS[script]).parse_args(others)
        else:
            assert (ROOT / script).is_file()
        if config and not config[0].startswith("--config=my_config.py"):
            config_flag.load_config(config, default="digits")


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_commands_that_classify_do_what_their_page_says(digits, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra predict")
    pathlib.Path("photos").mkdir()
    for path in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        services.PICTURE.save(path)
    shown = [(run(*arguments), capsys.readouterr().out)[1] for _, _, *arguments in commands("docs/predict.md")]
    page = (ROOT / "docs/predict.md").read_text()
    example = re.search(r"^```\n(photo.*?)```$", page, re.M | re.S)[1]
    assert re.sub(r"\d", "0", shown[0]) == re.sub(r"\d", "0", example)
    table = parquet.read_table("results")
    assert table["path"].to_pylist() == ["photos/1.jpg", "photos/2.jpg"]
    assert pathlib.Path("results.csv").read_text().startswith(",".join(table.column_names) + "\nphotos/1.jpg,1,")
    assert all(f"`{name}`" in page for name in table.column_names)


def test_the_page_on_files_lists_every_command():
    rows = [line.split("|")[1] for line in (ROOT / "docs/files.md").read_text().splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall("`([a-z]+)`", row)}
    assert set(main.COMMANDS) <= listed
