"""The conductor of the ten minutes on a device, on processes that end in each way."""

import json
import sys
import time
from pathlib import Path

import pytest

from ssl_vit.benchmark import main
from ssl_vit.benchmarks import own_process
from ssl_vit.benchmarks.device import Outcome, Part, carry_out, markdown, steps_table
from ssl_vit.commands.device_parts import parts
from ssl_vit.common.errors import UserError
from tests.forks import SPAWNS


def python(code: str, **options) -> Part:
    return Part("part", "", ("-c", code), **({"least": 0.0} | options))


def test_a_part_that_passes_gives_its_report():
    code = "import json; open(r'{out}', 'w').write(json.dumps(dict(images=3)))"
    outcome = carry_out(python(code), 60.0, "cpu")
    assert (outcome.state, outcome.found, outcome.said) == ("passed", {"images": 3}, [])


def test_a_part_that_fails_gives_its_last_words():
    outcome = carry_out(python("print('before'); raise SystemExit('no memory')"), 60.0, "cpu")
    assert (outcome.state, outcome.said) == ("failed", ["before", "no memory"])


def test_a_part_out_of_time_leaves_no_process_behind(tmp_path):
    """Nor one that it has started."""
    told = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(told)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    outcome = carry_out(python(code), 3.0, "cpu")
    assert outcome.state == "out of time"
    assert outcome.seconds < 30
    for _ in range(50):  # until it is reaped
        if not alive(int(told.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("its child lives on")


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_cannot_be_run_is_said(tmp_path):
    lacking = carry_out(python("", needs=("no_such_module",), files=(tmp_path / "x",)), 60.0, "cpu")
    assert lacking.state == "left out"
    assert lacking.said == ["no_such_module is not installed, x is only in a checkout"]
    late = carry_out(python("", least=30.0), 12.0, "cpu")
    assert (late.state, late.said) == ("not begun", ["12 s are left; 30 are needed"])


def test_tests_are_counted_and_failures_named(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\ndef test_a():\n    print('\\n    3 ms')\ndef test_b():\n    assert 1 == 2\n"
        "def test_c():\n    pytest.skip('of CUDA')\n"
    )
    arguments = ("-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "--junitxml", "{out}")
    outcome = carry_out(Part("tests", "", (*arguments, str(file)), least=0.0), 120.0, "cpu")
    assert outcome.state == "failed"
    assert outcome.found == {"tests": 3, "failure": 1, "error": 0, "skipped": 1}
    assert outcome.said[0] == "3 ms"
    assert outcome.said[-1] == "test_b: assert 1 == 2"


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [("cuda", None, "None"), ("cuda:1", None, "1"), ("cuda:1", "4,7", "7"), ("cpu", "4", "4")],
)
def test_a_part_sees_the_one_device(device, seen, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SSL_VIT_REHEARSE", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    code = "import os; raise SystemExit(' '.join(str(os.environ.get(n)) for n in "
    code += "('CUDA_VISIBLE_DEVICES', 'SSL_VIT_REHEARSE')))"
    rehearsed = "cpu" if device == "cpu" else None
    assert carry_out(python(code), 60.0, device).said == [f"{expected} {rehearsed}"]


def test_files_and_recipes_of_all_parts_are_there():
    for device in ("cpu", "cuda"):
        for part in parts(device):
            assert not part.missing, part
    names = [part.name for part in parts("cuda")]
    assert len(set(names)) == len(names)


def test_a_step_stands_in_the_table_beside_its_prediction(tmp_path, monkeypatch):
    """That of a real, small step; its encoder is not one that scale was asked for."""
    monkeypatch.setattr(own_process, "multiprocessing", SPAWNS)
    small = next(part for part in parts("cpu") if part.name == "mae_vit_b16 eager")
    *module, measured = small.arguments[:3]
    assert (module, measured) == (["-m", "ssl_vit.benchmark"], "step")
    report = tmp_path / "step.json"
    assert main([part.replace("{out}", str(report)) for part in small.arguments[2:]]) == 0
    outcome = Outcome("passed", found=json.loads(report.read_text()))
    row = steps_table({small.name: outcome}).rows[0]
    assert row[0] == "mae_vit_b16 eager, 2"
    assert float(row[1].replace(",", "")) > 0
    assert row[6] == "?"
    kept = {"fixed": 2**30, "per_image": 2**29}
    state = {"1": {"total": 3 * 2**30}}
    sizes = [{"name": "a", "state": state, "activations": {"kept": kept}}]
    outcome.found["options"]["encoder"] |= {"arch": "a", "depth": 0}
    both = {small.name: outcome, "scale mae": Outcome("passed", found={"sizes": sizes})}
    assert steps_table(both).rows[0][6] == "5.0 GiB"
    page = markdown(steps_table(both), "today, a GPU")
    assert page.splitlines()[2].startswith("|  | images/s |")
    assert page.splitlines()[4].startswith("| mae_vit_b16 eager, 2 |")


def test_without_time_the_report_says_so(tmp_path, capsys):
    assert (
        main(["device", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path / "out")])
        == 0
    )
    report = json.loads((tmp_path / "out" / "device.json").read_text())
    assert {part["state"] for part in report["parts"].values()} == {"not begun"}
    assert len(report["parts"]) == len(list(parts("cpu")))
    assert "not begun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no CUDA device is seen; --device cpu rehearses the parts on small networks"),
        (["--device", "mps"], "--device is 'mps'; allowed: auto, cuda, cuda:N, and"),
        (["--device", "cpu", "--minutes", "0"], "--minutes is 0; it must be above 0"),
        (
            ["--device", "cpu", "--out", sys.executable],
            f"--out is {sys.executable!r}, a file",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags, said):
    with pytest.raises(UserError) as error:
        main(["device", *flags])
    assert str(error.value).removeprefix("command line: ").startswith(said)
