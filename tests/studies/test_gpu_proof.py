"""The script for one GPU asks for cells that there are, and merges their rows; what it would run is replaced."""

import pathlib
import re
import subprocess

import grids

SCRIPT = pathlib.Path(__file__).parents[2] / "studies" / "gpu_proof.sh"
# Notes its arguments, and adds a row to the file of results, as studies/run.py does; the cells of J have no time left.
PYTHON = r"""#!/bin/sh
echo "$@" >> "$LOG"
for flag; do
    case $flag in --results=*) file=${flag#--results=} ;; --seeds=*) seed=${flag#--seeds=} ;; esac
done
[ "$1" = studies/run.py ] || exit 3
[ "$2" = F ] || exit 75
[ -e "$file" ] || echo "study,seed" > "$file"
echo "$2,$seed" >> "$file"
"""


def run(tmp_path, **environment):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment |= {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "LOG": str(tmp_path / "log")}
    command = [SCRIPT, "folder:/images", tmp_path / "out"]
    code = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
    return code, (tmp_path / "log").read_text().splitlines()


def test_its_cells_are_those_of_the_studies():
    (parts,) = re.findall(r"\$\{PARTS-([^}]*)\}", SCRIPT.read_text())
    for part in parts.split():
        study, _, recipes = part.partition(":")
        for name in recipes.split(","):
            grids.STUDIES[study].recipe(name)


def test_all_seeds_train_and_their_rows_are_merged(tmp_path):
    code, commands = run(tmp_path, PARTS="F:plain F:sdpoint", BENCHMARKS="", EPOCHS="0.4")
    assert code == 0 and len(commands) == 6
    assert all("--data=folder:/images" in command and "--epochs=0.4" in command for command in commands)
    merged = (tmp_path / "out" / "F.csv").read_text().splitlines()
    assert merged == ["study,seed", *[f"F,{seed}" for seed in "001122"]]


def test_a_seed_ends_at_its_first_cell_that_has_no_time_left(tmp_path):
    code, commands = run(tmp_path, SEEDS="0", PARTS="F:plain J:plain F:sdpoint")
    assert code == 75
    assert [command.split()[:2] for command in commands if "studies" in command] == [
        ["studies/run.py", "F"],
        ["studies/run.py", "J"],
    ]
    assert {command.split()[0] for command in commands} > {"benchmarks/train_step.py", "benchmarks/input_pipeline.py"}
    assert (tmp_path / "out" / "F.csv").read_text() == "study,seed\nF,0\n"
