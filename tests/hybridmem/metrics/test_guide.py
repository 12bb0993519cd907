"""Examples of docs/watch.md run unchanged and print the documented output."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "watch.md"


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out
    for expected in ("0.6667", "0.5000", "1.0986", "1.5000", "0.1250", "0.4621", "68.9", "shares=[0.6, 0.6]", "0.625"):
        assert expected in printed
