"""Scripts with one-line errors, and lines of other packages that are hidden."""

import logging
import runpy
import sys
import warnings

import pytest

from hybridmem.cli.console import PACKAGE, Once, format_warning, hide_useless_lines, is_useful

SCRIPT = '''
from hybridmem.checks import at_least
from hybridmem.cli.console import run_script

def main(steps: int, fault: str = ""):
    """Do nothing.

    Args:
        steps: steps to take.
        fault: error to raise.
    """
    at_least(1, steps=steps)
    if fault == "own":
        raise ValueError("own fault")
    if fault == "callback":
        sys.modules["hybridmem.checks"].number_held_out(Fraction(), 2, "")
    if fault == "stop":
        raise KeyboardInterrupt

class Fraction:
    def __rmul__(self, _):
        return int("x")

if __name__ == "__main__":
    import sys
    run_script(main)
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ([], 2, "script.py: error: --steps is required (or --config FILE with the settings)"),
        (["--steps", "x"], 2, "script.py: error: steps: Expected a int. Got value: x"),
        (["--steps", "0"], 2, "script.py: error: steps must be at least 1, not 0"),
        (["--steps", "1", "--fault", "stop"], 130, "script.py: interrupted"),
    ],
)
def test_scripts_end_in_one_line(script, capsys, options, status, said):
    with pytest.raises(SystemExit) as stopped:
        script(*options)
    assert stopped.value.code == status
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(("fault", "message"), [("own", "own fault"), ("callback", "invalid literal")])
def test_errors_of_the_scripts_own_code_keep_their_traceback(script, fault, message):
    with pytest.raises(ValueError, match=message):
        script("--steps", "1", "--fault", fault)


def record(message):
    return logging.LogRecord("", logging.INFO, "", 0, message, None, None)


def test_useless_lines():
    hidden = ["GPU available: False, used: False", "TPU available: False, using: 0 TPU cores", "Tip: buy this"]
    assert not any(is_useful(record(line)) for line in hidden)
    assert is_useful(record("GPU available: True (cuda), used: False"))
    once = Once()
    assert [once.filter(record(line)) for line in ("Name not known", "Retrying in 1s")] == [True, False]


def test_warnings_of_the_package_are_one_line():
    own = str(PACKAGE / "training" / "pretrain.py")
    assert format_warning("look here", UserWarning, own, 9) == "warning: look here\n"
    assert "/lib/other.py:9:" in format_warning("look here", UserWarning, "/lib/other.py", 9)


def test_the_advice_on_manual_optimization_is_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_useless_lines()
        warnings.warn("Using ModelCheckpoint with manual optimization and every_n_train_steps, but", stacklevel=1)
    assert not shown
