"""How the pages of the documentation show what lies in bench/results/: tables of figures with command, machine and date."""
import json
from collections.abc import Iterable, Mapping
from typing import Any

from IPython.display import Markdown
from results import FOLDER

NOTHING = 'Not measured yet.'


def results(name: str) -> list[dict[str, Any]]:
    "Result files of one name, in the order of their file names"
    found = [json.loads(p.read_text()) for p in sorted(FOLDER.glob('*.json'))]
    for r in found: assert {'name', 'command', 'machine', 'date', 'metrics'} <= set(r), r
    return [r for r in found if r['name'] == name]


def figure(v: Any) -> str:
    "A number as a reader wants it; words as they are"
    if not isinstance(v, (int, float)): return str(v)
    if v != v: return 'none'  # a share of nothing
    if abs(v) >= 100 or v == int(v): return f'{v:,.0f}'
    if 0 < abs(v) < 0.001: return f'{v:.0e}'
    return f'{v:.3g}' if abs(v) < 10 else f'{v:.1f}'


def heading(found: Iterable[Mapping[str, Any]]) -> str:
    "Command, machine and date, once for all files that share them"
    found = list(found)
    machines = sorted({f'{r["machine"]}; {r["date"]}' for r in found})
    return '\n\n'.join(f'`{c}`' for c in dict.fromkeys(r['command'] for r in found)) + '\n\n' + '; '.join(machines) + '\n\n'


def lines(rows: Iterable[Iterable[str]]) -> str:
    "A Markdown table, its head first"
    head, *body = [list(r) for r in rows]
    return '\n'.join(f'| {" | ".join(r)} |' for r in (head, ['---'] * len(head), *body))


def table(
    name: str,
    columns: Mapping[str, str],  # metric -> title
    summary: Iterable[tuple[str, bool]] = (),  # (metric, is larger better?): those get a mean and a worst row
) -> Markdown:
    "One row a file"
    found = results(name)
    if not found: return Markdown(NOTHING)
    used = [(k, title) for k, title in columns.items() if any(k in r['metrics'] for r in found)]
    rows = [[figure(r['metrics'][k]) if k in r['metrics'] else '' for k, _ in used] for r in found]
    better = dict(summary)
    if len(found) > 1 and better:
        values = {k: [r['metrics'][k] for r in found if k in r['metrics']] for k, _ in used}
        rows.append(['**mean**' if i == 0 else figure(sum(values[k]) / len(values[k])) if k in better else '' for i, (k, _) in enumerate(used)])
        worst = {k: min(v) if better.get(k) else max(v) for k, v in values.items()}
        rows.append(['**worst**' if i == 0 else figure(worst[k]) if k in better else '' for i, (k, _) in enumerate(used)])
    return Markdown(heading(found) + lines([[t for _, t in used], *rows]))


def by_way(
    name: str,
    columns: Mapping[str, str],  # 'seconds' -> title, for metrics named 'WAY: seconds'
    file: str | None = None,  # a result file's command must contain this
) -> Markdown:
    "One row a way of doing the same work, where metrics are named `WAY: WHAT`"
    found = [r for r in results(name) if file is None or file in r['command']]
    if not found: return Markdown(NOTHING)
    out = []
    for r in found:
        ways = dict.fromkeys(k.split(': ')[0] for k in r['metrics'] if ': ' in k and k.split(': ')[1] in columns)
        rows = [[way, *(figure(r['metrics'][f'{way}: {c}']) if f'{way}: {c}' in r['metrics'] else '' for c in columns)] for way in ways]
        rest = ', '.join(f'{k} {figure(v)}' for k, v in r['metrics'].items() if ': ' not in k)
        out.append(heading([r]) + (f'{rest}\n\n' if rest else '') + lines([['', *columns.values()], *rows]))
    return Markdown('\n\n'.join(out))


def everything(name: str) -> Markdown:
    "Each figure of the newest file of a name, one a row, with what could not be measured and why"
    found = results(name)
    if not found: return Markdown(NOTHING)
    rows = [(k, figure(v)) for k, v in found[-1]['metrics'].items()] + [(k, f'not measured: {why}') for k, why in found[-1].get('not_measured', {}).items()]
    return Markdown(heading(found[-1:]) + lines([('', ''), *rows]))
