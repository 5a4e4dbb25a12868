"Each public name says what it is; each parameter whose meaning its name and type leave open says that too"
import ast
import io
import tokenize
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
package = root / 'tts_tuner'
modules = sorted(p for p in package.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))


def exported(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__': return set(ast.literal_eval(node.value))
    return set()


@pytest.fixture(scope='module', params=modules, ids=lambda p: p.relative_to(package).as_posix())
def module(request):
    "Tree of a module, and the lines that carry a comment"
    text = request.param.read_text()
    commented = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    return ast.parse(text), commented


def public(tree):
    "Exported functions and classes, and the public methods of those classes"
    names = exported(tree)
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name not in names: continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for sub in node.body:
                if isinstance(sub, ast.FunctionDef) and not sub.name.startswith('_'): yield f'{node.name}.{sub.name}', sub


INHERITED = {'forward'}  # what torch asks a module to have


def test_each_public_name_has_a_sentence(module):
    "Methods that are one expression, and those of a class that follows a described protocol, speak for themselves"
    tree, _ = module
    names = list(public(tree))
    described = {n.rpartition('.')[2] for n, node in names if '.' in n and ast.get_docstring(node)} | INHERITED
    silent = [n for n, node in names if not ast.get_docstring(node) and not ('.' in n and (len(node.body) == 1 or n.rpartition('.')[2] in described))]
    assert not silent, f'no docstring: {silent}'


def test_each_public_signature_is_typed(module):
    tree, _ = module
    bare = []
    for n, node in public(tree):
        if isinstance(node, ast.ClassDef): continue
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare += [f'{n}({a.arg})' for a in args if a.annotation is None and a.arg not in ('self', 'cls')]
        if node.returns is None: bare.append(f'{n} -> ?')
    assert not bare, f'no type: {bare}'


PLAIN = {'int', 'float', 'str', 'bool', 'bytes', 'Tensor', 'torch.Tensor', 'np.ndarray', 'ArrayLike', 'Any', 'Path', 'str | Path'}


def test_functions_of_many_numbers_comment_their_parameters(module):
    "Of the parameters whose type alone says little, some carry a comment, in functions of three or more of them"
    tree, commented = module
    silent = []
    for n, node in public(tree):
        if isinstance(node, ast.ClassDef) or '.' in n: continue
        plain = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation is not None and ast.unparse(a.annotation) in PLAIN]
        if len(plain) >= 3 and not any(a.lineno in commented for a in plain): silent.append(n)
    assert not silent, f'parameters without a word: {silent}'


def test_dataclasses_comment_their_fields(module):
    "Most fields of a public dataclass or named tuple have a comment or a meaning; the others' names are one"
    tree, commented = module
    silent = []
    for n, node in public(tree):
        if not isinstance(node, ast.ClassDef): continue
        kinds = [ast.unparse(x) for x in [*node.decorator_list, *node.bases]]
        if not any('dataclass' in k or k == 'NamedTuple' for k in kinds): continue
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and ast.unparse(f.annotation) in PLAIN]
        told = [f for f in fields if f.lineno in commented or f.end_lineno in commented or (f.value is not None and 'hp(' in ast.unparse(f.value))]
        if len(fields) > 2 and 2 * len(told) < len(fields): silent.append(f'{n}: {[f.target.id for f in fields if f not in told]}')
    assert not silent, f'fields without a word: {silent}'
