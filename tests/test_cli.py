"""What a user types and sees: help, exit codes, JSON, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evlecg import cli

HEAVY = ("torch", "transformers", "accelerate", "numpy", "scipy", "sklearn", "wfdb", "cv2")


def run(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evlecg", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out, shown.err


@pytest.fixture
def evlecg(monkeypatch, capsys, tmp_path):
    """`evlecg("eval", ...) -> (exit code, stdout, stderr)` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVLECG_DATA", raising=False)
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_help_and_version_leave_the_heavy_modules_alone():
    code = (
        "import sys; from evlecg import cli\n"
        "for arguments in (['--help'], ['--version'], ['distill', '--help']):\n"
        "    sys.argv = ['evlecg', *arguments]\n"
        "    try: cli.main()\n"
        "    except SystemExit as stopped: assert not stopped.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("command", ["prepare", "distill", "eval", "export"])
def test_every_command_shows_an_example(evlecg, command):
    code, out, _ = evlecg(command, "--help")
    assert code == 0 and "Example" in out and f"evlecg {command}" in out


def test_version(evlecg):
    from evlecg import __version__

    assert evlecg("--version") == (0, f"evlecg {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepare", "--dataset", "ptbxxl", "--out", "x"], "did you mean 'ptbxl'"),
        (["prepare", "--dataset", "ludb", "--out", "x"], "needs its download"),
        (["prepare", "--dataset", "ludb", "--source", "missing", "--out", "x"], "does not exist"),
        (["prepare", "--dataset", "ludb", "--source", "empty", "--out", "x"], "empty"),
        (["prepare", "--dataset", "synthetic", "--out", "full"], "not empty"),
        (["distill", "--set", "trian.lr=1"], "did you mean 'train'"),
        (["distill", "--recipe", "quickstrat"], "did you mean 'quickstart'"),
        (["distill", "--method", "elv"], "did you mean 'evl'"),
        (["distill", "--student", "builtin:studnet", "--data", "synthetic", "--set", "data.synthetic_train=2",
          "--set", "data.synthetic_val=1", "--set", "data.synthetic_test=1"], "did you mean 'student'"),
        (["distill", "--data", "missing"], "no such folder"),
        (["distill", "--resume"], "--out RUN"),
        (["eval", "--dataset", "nothing"], "no dataset and no prepared folder"),
        (["eval", "--dataset", "empty"], "no dataset and no prepared folder"),
        (["export", "missing", "--out", "x"], "no finished run"),
        (["eval"], "eval needs a dataset"),
        (["evaluate"], "No such command"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_exit_code_2(evlecg, arguments, said):
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").write_text("x")
    code, out, err = evlecg(*arguments)
    assert code == 2
    assert said in err and "Traceback" not in err
    assert out == ""
    left = {item.name for item in Path().iterdir()} - {"data"}  # `data` holds a finished synthetic set at most
    assert left == {"empty", "full"}


def test_a_dataset_that_is_not_there_comes_with_the_commands_that_get_it(evlecg):
    code, _, err = evlecg("eval", "--dataset", "ptbxl")
    assert code == 2
    assert "wget" in err and "ptb-xl/1.0.3" in err
    assert "evlecg prepare --dataset ptbxl --source data/ptbxl --out data/ptbxl-prepared" in err


def test_json_goes_to_stdout_alone(evlecg):
    code, out, err = evlecg("prepare", "--dataset", "synthetic", "--out", "data/s", "--train", "3", "--val", "1",
                            "--test", "2", "--json")  # fmt: skip
    assert code == 0 and "synthetic" in err
    assert json.loads(out)["splits"] == {"train": 3, "val": 1, "test": 2}
    code, out, err = evlecg("prepare", "--dataset", "synthetic", "--out", "data/s", "--json")
    assert code == 2 and err.startswith("error:")
    assert "counts differ" in json.loads(out)["error"]["what"]


def test_the_catalogue_says_what_each_dataset_needs(evlecg):
    code, out, _ = evlecg("prepare", "--list", "--json")
    known = json.loads(out)
    assert code == 0 and {"ptbxl", "cpsc2018", "cpsc2018-extra", "ptb", "georgia", "chapman-ningbo", "cinc2020",
                          "cinc2021", "code15", "ludb", "mimic-iv-ecg", "wfdb", "dicom", "ecgqa", "ecginstruct",
                          "ecg-grounding", "ecgbench"} <= set(known)  # fmt: skip
    _, text, _ = evlecg("prepare", "--list")
    lines = {line.partition(":")[0]: line for line in text.splitlines() if not line.startswith(" ")}
    for name, about in known.items():
        assert about["licence"] and about["licence"] in lines[name]
        assert name in ("wfdb", "dicom") or about["citation"]
        assert "GB" in lines[name] or "as large as" in lines[name]
        if about["records"] and about["labels"]:  # 12 leads of 16 bits, 5 s at 250 Hz at the least
            assert about["prepared_GB"] * 1e9 > 12 * 2 * 5 * 250 * about["records"], name
            assert about["prepared_GB"] <= about["download_GB"] * 1.05, name
