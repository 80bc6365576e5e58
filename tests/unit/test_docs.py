"""The documents: the README's code is right, links lead somewhere, pictures can be made."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_code_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert (tmp_path / "step.png").stat().st_size > 10_000
    # The decode is the last row of q: all 500 tokens of request 1, groups of 4 heads.
    pages = names["pages"][1].long()
    k, v = (names[x][pages].flatten(0, 1)[:500].float().transpose(0, 1) for x in "kv")
    q = names["q"][100].float()[:, None]
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(4, 0), v.repeat_interleave(4, 0)
    )
    torch.testing.assert_close(names["out"][100].float(), expected[:, 0], atol=4e-3, rtol=2e-2)
    assert not torch.equal(names["capped_out"], names["out"])
    assert names["capped_out"].isfinite().all()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", document.read_text())
    local = [link.split("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    names = re.findall(
        r"`((?:fi_backend|kernels|tests|docs|integrations)/[\w/.]+)`", document.read_text()
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_picture_can_be_made(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs/make_pictures.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (ROOT / "docs/pictures").iterdir()}
    shown = set(re.findall(r"\(pictures/([\w.]+)\)", (ROOT / "docs/layouts.md").read_text()))
    assert shown == made
