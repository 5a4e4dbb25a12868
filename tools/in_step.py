"""Fail when a module is not what its notebook exports, or a notebook is not clean.

Works on a copy, so the tree stays as it is and a failure stays a failure until somebody exports.
"""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = 'nbs', 'tts_tuner'


def files(top: Path) -> set[str]:
    "Paths of all files of interest under `top`, caches left out"
    skip = {'__pycache__', '.ipynb_checkpoints', '.last_checked'}
    return {str(p.relative_to(top)) for part in PARTS for p in (top / part).rglob('*')
            if p.is_file() and p.suffix in ('.py', '.ipynb') and not skip & set(p.parts)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'copy'
        copy.mkdir()
        for part in PARTS: shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT / name, copy / name)
        for tool in ('nbdev-export', 'nbdev-clean'): subprocess.run([tool], cwd=copy, check=True)
        here, there = files(ROOT), files(copy)
        differ = sorted((here ^ there) | {f for f in here & there if not filecmp.cmp(ROOT / f, copy / f, shallow=False)})
    if differ: sys.exit('Not in step; run nbdev-export && nbdev-clean and commit:\n  ' + '\n  '.join(differ))
    print(f'{sum(f.endswith(".ipynb") for f in here)} notebooks and their modules are in step.')


if __name__ == '__main__': main()
