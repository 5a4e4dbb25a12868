"The shape of the package: who may import whom, what loads when, how a notebook is built, nothing of one machine in the files"
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
package = root / 'tts_tuner'
modules = sorted(p for p in package.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
notebooks = sorted(p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

FLOORS = {'config': 0, 'text': 0, 'audio': 0, 'data': 1, 'model': 1, 'signals': 2, 'quality': 2, 'control': 3, 'training': 4, 'tuner': 5, 'serve': 6}
TOP = 7  # cli, report, doctor and what they are made of

HEAVY = {'mlflow', 'optuna', 'matplotlib', 'librosa', 'soundfile', 'soxr', 'scipy', 'tensorboard', 'omegaconf', 'pydantic', 'rich', 'typer', 'jinja2', 'pandas',
    'sklearn', 'psutil', 'espeakng_loader', 'yaml', 'pesq', 'pystoi', 'IPython', 'apprise', 'ray', 'hyperopt', 'wandb', 'statsmodels', 'ruptures', 'speechmos', 'onnxruntime'}
COMMAND = ['command.py', *sorted(p.name for p in package.glob('cli*.py'))]
SETTINGS = ('settings', 'blocks', 'dimension', 'provenance', 'run_settings', 'surroundings')
ALLOWED = {**{f'config/{name}.py': {'pydantic', 'omegaconf'} for name in SETTINGS}, 'live.py': {'rich'}, **{f: {'typer'} for f in COMMAND}}
NUMPY_ONLY = ('quality', 'signals')  # no torch there


def name(path): return path.relative_to(package).as_posix()


def floor(path): return FLOORS.get(path.relative_to(package).parts[0], TOP)


def imported(path, top_level_only=False):
    "Absolute names of what a module imports"
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)} if top_level_only else set()
    typing_only = {id(n) for f in ast.walk(tree) if isinstance(f, ast.If) and 'TYPE_CHECKING' in ast.unparse(f.test) for n in ast.walk(f)} if top_level_only else set()
    here = ('tts_tuner', *path.relative_to(package).parts[:-1])
    for node in ast.walk(tree):
        if id(node) in inside | typing_only: continue
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else ()
            full = '.'.join([*base, *([node.module] if node.module else [])])
            yield full
            yield from (f'{full}.{a.name}' for a in node.names)


@pytest.mark.parametrize('path', modules, ids=name)
def test_imports_go_down(path):
    for target in imported(path):
        if not target.startswith('tts_tuner.'): continue
        part = target.split('.')[1]
        if part.startswith('_'): continue
        above = FLOORS.get(part, TOP)
        assert above <= floor(path), f'{name(path)} (floor {floor(path)}) imports {target} (floor {above})'


def test_imports_make_no_circle():
    "Among modules of one floor too"
    known = {'.'.join(['tts_tuner', *p.relative_to(package).with_suffix('').parts]): p for p in modules}
    graph = {n: {t for t in imported(p) if t in known and t != n} for n, p in known.items()}
    done, path = set(), []

    def visit(n):
        assert n not in path, 'a circle: ' + ' -> '.join([*path[path.index(n):], n])
        if n in done: return
        path.append(n)
        for t in sorted(graph[n]): visit(t)
        path.pop()
        done.add(n)

    for n in graph: visit(n)


@pytest.mark.parametrize('path', modules, ids=name)
def test_heavy_packages_are_imported_inside_functions(path):
    heavy = {t.split('.')[0] for t in imported(path, top_level_only=True)} & HEAVY
    assert heavy <= ALLOWED.get(name(path), set()), f'{name(path)} imports {sorted(heavy)} when it is loaded'


@pytest.mark.parametrize('path', [m for m in modules if name(m).split('/')[0] in NUMPY_ONLY], ids=name)
def test_rulers_need_no_torch(path):
    assert 'torch' not in {t.split('.')[0] for t in imported(path)}


def test_importing_the_package_loads_nothing_heavy():
    "What is heavy, and torch and numpy too"
    code = f'import sys, tts_tuner; print(sorted(set(sys.modules) & set({sorted(HEAVY | {"torch", "numpy"})!r})))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == '[]', out.stdout + out.stderr


def test_exported_code_uses_no_star_import_and_no_unfinished_mark():
    for path in modules:
        text = path.read_text()
        assert not re.search(r'^\s*from \S+ import \*', text, flags=re.M), f'{name(path)}: star import'
        assert not re.search(r'\b(TODO|FIXME|XXX|NotImplementedError)\b', text), f'{name(path)}: unfinished'
        assert not re.search(r'^\s*except\s*:', text, flags=re.M), f'{name(path)}: bare except'


def test_functions_fit_on_a_screen():
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f'{name(path)}: {node.name} has {lines} lines'


def cells(path): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text())['cells']]


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(root / 'nbs').as_posix())
def test_notebook_opens_and_ends_as_all_do(path):
    found = cells(path)
    exports = [s for kind, s in found if kind == 'code' and re.match(r'#\|\s*export\b', s)]
    if exports:
        assert re.match(r'#\|\s*default_exp \S+', found[0][1]), 'the first cell is #| default_exp'
        found = found[1:]
        assert any('assert' in s for kind, s in cells(path) if kind == 'code' and s not in exports), 'no assertion outside the exported code'
    assert re.match(r'# .+\n> .+', found[0][1]), 'a title and a one-line subtitle come first'
    if path.stem != 'index': assert any(kind == 'markdown' and re.search(r'^## Limits', s, flags=re.M) for kind, s in found), 'no "## Limits" at the end'
    assert sum(s.count('\n') + 1 for s in exports) <= 450, 'too much for one module'


def tracked():
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, capture_output=True, text=True)
    if out.returncode: pytest.skip('not a git repository: the list of files is not known')
    return [root / f for f in out.stdout.splitlines() if (root / f).is_file()]


def test_files_name_no_folder_of_one_machine():
    "Home folders, and the folder this copy lies in, when that is more than a usual name"
    own = [str(root.parent)] if len(root.parent.parts) > 1 and root.parent.parts[1] not in ('tmp', 'home', 'root', 'Users', 'usr', 'opt') else []
    pattern = re.compile('|'.join([r'/home/\w+/', r'/Users/\w+/', r'/root/', *(re.escape(p) + r'/' for p in own)]))
    for path in tracked():
        if path == Path(__file__) or path.suffix in ('.png', '.wav', '.flac', '.npz'): continue
        hit = pattern.search(path.read_text(encoding='utf-8', errors='replace'))
        assert not hit, f'{path.relative_to(root)} names {hit[0]}'
