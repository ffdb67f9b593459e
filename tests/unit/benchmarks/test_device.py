"""The conductor of the ten minutes on a device, on processes that end in each way."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from ssl_vit.benchmark import main
from ssl_vit.benchmarks import own_process
from ssl_vit.benchmarks.device import Outcome, Part, carry_out, markdown, steps_table
from ssl_vit.commands import device_needs
from ssl_vit.commands.device import carried_out
from ssl_vit.commands.device_parts import parts
from ssl_vit.common.errors import UserError
from tests.conftest import ROOT
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


def test_what_a_failed_part_has_instead_is_tried():
    """Our numbers are there where a peer ends a comparison; why it did is said."""
    part = Part("part", "", ("-c", "raise SystemExit('no peer')"), 0.0, otherwise=("-c", "print()"))
    outcome = carry_out(part, 60.0, "cpu")
    assert outcome.state == "passed"
    assert outcome.said == ["failed at first (no peer), then run as: -c print()"]
    late = Part("part", "", ("-c", "raise SystemExit('no peer')"), 59.99, otherwise=("-c", ""))
    assert carry_out(late, 60.0, "cpu").state == "failed"


def test_a_part_has_a_limit_of_its_own():
    outcome = carry_out(python("import time; time.sleep(60)", most=1.0), 60.0, "cpu")
    assert outcome.state == "out of time"
    assert outcome.seconds < 30


def test_a_part_out_of_time_keeps_what_it_has_measured():
    """And its last words; it is interrupted, so that it may write what it knows."""
    code = (
        "import json, time\nprint('=> 3 ms'); print('begun')\ntry: time.sleep(60)\n"
        "except KeyboardInterrupt: open(r'{out}', 'w').write(json.dumps(dict(images=3)))"
    )
    outcome = carry_out(python(code, most=4.0), 60.0, "cpu")
    assert (outcome.state, outcome.found) == ("out of time", {"images": 3})
    assert outcome.said == ["3 ms", "begun"]


TESTS = ("-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", "--junitxml", "{out}")


def of_tests(folder: Path, text: str, **options) -> Part:
    (folder / "test_it.py").write_text(text)
    arguments = (*TESTS, "--rootdir", str(folder), str(folder / "test_it.py"))
    return Part("tests", "", arguments, **({"least": 0.0} | options))


def test_tests_that_are_interrupted_are_counted_as_far_as_they_came(tmp_path):
    text = "import os, signal\ndef test_a():\n    print('\\n=> 3 ms')\n"
    text += "def test_b():\n    assert 1 == 2\n"
    text += "def test_c():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    outcome = carry_out(of_tests(tmp_path, text), 60.0, "cpu")
    assert outcome.found["failure"] == 1
    assert outcome.said == ["3 ms", "test_b: assert 1 == 2"]


def test_a_part_all_of_whose_tests_are_skipped_has_not_passed(tmp_path):
    text = "import pytest\npytestmark = pytest.mark.skip('of CUDA')\ndef test_a(): pass\n"
    outcome = carry_out(of_tests(tmp_path, f"{text}def test_b(): pass\n"), 60.0, "cpu")
    assert (outcome.state, outcome.said) == ("left out", ["of CUDA"])


def test_a_file_of_tests_that_cannot_be_imported_says_why(tmp_path):
    outcome = carry_out(of_tests(tmp_path, "import no_such_module\n"), 60.0, "cpu")
    assert outcome.state == "failed"
    assert outcome.said[0].endswith("ModuleNotFoundError: No module named 'no_such_module'")


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
    text = (
        "import pytest\ndef test_a():\n    print('\\n=> 3 ms')\ndef test_b():\n    assert 1 == 2\n"
        "def test_c():\n    pytest.skip('of CUDA')\n"
    )
    outcome = carry_out(of_tests(tmp_path, text), 120.0, "cpu")
    assert outcome.state == "failed"
    assert outcome.found == {"tests": 3, "failure": 1, "error": 0, "skipped": 1}
    assert outcome.said == ["3 ms", "test_b: assert 1 == 2"]


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
        names = [part.name for part in parts(device)]
        assert len(set(names)) == len(names)


def test_all_parts_may_begin_within_nine_minutes():
    """Even if each but the last takes all that it may need at least; none may take them all."""
    asked = [part for part in parts("cuda") if not part.beside]
    assert sum(part.least for part in asked) < 540
    assert all(part.most <= 200 for part in asked)


def test_a_peer_that_fails_costs_only_the_comparison():
    for part in parts("cuda"):
        if "--against" in part.arguments and part.arguments[-1] != "none":
            assert part.otherwise == (*part.arguments[:-1], "none")


def test_parts_that_need_no_device_run_beside_the_others(tmp_path):
    """Each waits for a file of the other's; they are given no device."""
    wait = "import os, pathlib, time\nopen({mine!r}, 'w').close()\n"
    wait += "while not pathlib.Path({other!r}).exists(): time.sleep(0.05)\n"
    wait += "print('=> rehearsed:', os.environ.get('SSL_VIT_REHEARSE'))"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    here = python(wait.format(mine=one, other=two))
    aside = python(wait.format(mine=two, other=one), beside=True)
    found = list(carried_out([aside, here], 30.0, "cuda"))
    assert [part for part, _ in found] == [here, aside]
    assert [outcome.state for _, outcome in found] == ["passed", "passed"]
    assert found[1][1].said == ["rehearsed: cpu"]


def test_an_interrupted_proof_leaves_no_part_behind(tmp_path):
    """Neither the one beside the others, nor what it has started."""
    told = tmp_path / "processes"
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(told)!r}).write_text(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "time.sleep(60)"
    )
    waits = "import pathlib, time\n"
    waits += f"while not pathlib.Path({str(told)!r}).exists(): time.sleep(0.05)"
    late = tmp_path / "late"
    never = python(f"import pathlib; pathlib.Path({str(late)!r}).touch()", beside=True)
    found = carried_out([python(code, beside=True), never, python(waits)], 60.0, "cpu")
    assert next(found)[1].state == "passed"
    while not (text := told.read_text()).endswith("\n"):
        time.sleep(0.05)
    began = time.perf_counter()
    found.close()
    assert time.perf_counter() - began < 20
    for process in map(int, text.split()):
        until = time.perf_counter() + 10
        while alive(process) and time.perf_counter() < until:
            time.sleep(0.05)
        assert not alive(process)
    assert not late.exists()


def test_a_step_stands_in_the_table_beside_its_prediction(tmp_path, monkeypatch):
    """That of a real, small step; its encoder is not one that scale was asked for."""
    monkeypatch.setattr(own_process, "multiprocessing", SPAWNS)
    small = next(part for part in parts("cpu") if part.name.startswith("mae_vit_b16 eager"))
    *module, measured = small.arguments[:3]
    assert (module, measured) == (["-m", "ssl_vit.benchmark"], "step")
    report = tmp_path / "step.json"
    assert main([part.replace("{out}", str(report)) for part in small.arguments[2:]]) == 0
    outcome = Outcome("passed", found=json.loads(report.read_text()))
    row = steps_table({small.name: outcome}).rows[0]
    assert row[0] == "mae_vit_b16 eager, 8"
    assert float(row[1].replace(",", "")) > 0
    assert row[6] == "?"
    kept = {"fixed": 2**30, "per_image": 2**29}
    state = {"1": {"total": 3 * 2**30}}
    recipe = {"name": "mae_vit_b16", "state": state, "activations": {"kept": kept}}
    outcome.found["options"]["encoder"] |= {"depth": 0}
    both = {small.name: outcome, "scale mae": Outcome("passed", found={"recipes": [recipe]})}
    assert steps_table(both).rows[0][6] == "8.0 GiB"
    page = markdown(steps_table(both), "today, a GPU")
    assert page.splitlines()[2].startswith("|  | images/s |")
    assert page.splitlines()[4].startswith("| mae_vit_b16 eager, 8 |")


def test_without_time_the_report_says_so(tmp_path, capsys):
    assert (
        main(["device", "--device", "cpu", "--minutes", "0.001", "--out", str(tmp_path / "out")])
        == 0
    )
    report = json.loads((tmp_path / "out" / "device.json").read_text())
    assert {part["state"] for part in report["parts"].values()} == {"not begun"}
    assert len(report["parts"]) == len(list(parts("cpu")))
    assert "not begun" in capsys.readouterr().out


def test_what_is_not_installed_is_one_line_before_it_is_imported():
    """Without the folder of packages; as many commands bring them as there are kinds of places."""
    door = [sys.executable, "-S", "-m", "ssl_vit.benchmark", "device"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(door, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: not installed: torch, ")
    assert " -d wheels --only-binary=:all: --python-version 3." in done.stderr
    assert done.stderr.count("\n") == 1


def test_all_that_the_project_needs_is_looked_for():
    """But for what no part imports; with what tyro needs, and what the tests do."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split("[<>=]", text)[0] for text in project["dependencies"]}
    more = {"docstring-parser", "typeguard", "pytest", "beartype"}
    assert set(device_needs.NEEDED) == asked - set(device_needs.UNUSED) | more
    assert device_needs.missing() == []


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
