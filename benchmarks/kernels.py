"""Every operator beside every alternative on this device, in one run.

Forward and forward+backward, medians of seven interleaved samples (fewer of slow ways); ratio of
each alternative to ours (above 1: ours is faster), like with like: what torch.compile made beside
ours under torch.compile, everything else beside ours as it is called without a compiler; GB/s and
TFLOP/s of the least possible traffic and work as a share of the copy and product ceilings measured
in the same run, peak memory of forward+backward, error against float64. With --json, one run may
measure some operators and a later one the others: the file collects them, and the table and the
plot show all that it holds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that was never installed

import torch  # noqa: E402
from break_even import structures  # noqa: E402
from kernel_cases import COMPILED, OURS, Case, Way, operators  # noqa: E402
from measure import (  # noqa: E402
    MOST,
    both_call,
    ceilings,
    error,
    forward_call,
    interleaved,
    machine,
    peak_bytes,
)

Row = dict[str, Any]
LENGTHS = [2**k for k in range(10, 17)]
SLOPE = 0.1  # of log time over log T, away from 1
CALL = {"forward": 10, "both": 30}  # microseconds above the work


def measure_case(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    """One row a way, ours first; a way that cannot run is a row that says why."""
    torch.manual_seed(0)
    torch.compiler.reset()  # a function is compiled for eight shapes, then left as it is
    inputs = case.make(device, dtype)
    ways = case.ways()
    rows: dict[str, Row] = {name: {"case": case.name, "way": name} for name in ways}
    here: dict[str, Way] = {}
    for name, way in ways.items():
        if way.missing is None:
            try:
                rows[name]["error"] = error(way, case, inputs)
                here[name] = way
            except Exception as e:  # whatever a library raises: the others keep their numbers
                rows[name]["missing"] = failure(e)
        else:
            rows[name]["missing"] = way.missing
    forward = interleaved([forward_call(w, inputs) for w in here.values()], device, rounds)
    for name, taken in zip(here, forward, strict=True):
        rows[name] |= timing("forward", taken)
    trained = {}
    for name, way in here.items():
        if way.forward_only is None:
            try:
                trained[name] = both_call(way, inputs)
                if device.type == "cuda":  # where a backward may have too little memory
                    trained[name]()
            except Exception as e:  # as above
                trained.pop(name, None)
                rows[name]["no_backward"] = failure(e)
    for name, taken in zip(
        trained, interleaved(list(trained.values()), device, rounds), strict=True
    ):
        rows[name] |= timing("both", taken)
        if min(taken) < MOST:  # the profiler takes minutes over the events of a long loop
            rows[name]["peak_bytes"] = peak_bytes(trained[name], device)
    size = inputs[0].element_size()
    for row in rows.values():
        compare(row, rows.get(case.beside(row["way"]), {}), case, size)
        if case.scale is not None:
            row["scale"] = case.scale
    return list(rows.values())


def broken(rows: Sequence[Row]) -> list[str]:
    """What of ours did not run: a row of the table like another's, but an error of the whole."""
    ours = (row for row in rows if row["way"] in (OURS, COMPILED))
    whys = ((row, row.get("missing") or row.get("no_backward")) for row in ours)
    return [f"{row['case']}, {row['way']}: {why}" for row, why in whys if why]


def failure(error: Exception) -> str:
    """The first line of what it says, fit for a cell of a table."""
    line = next(iter(str(error).splitlines()), "")[:200].replace("|", "/")
    print(f"{type(error).__name__}: {line}", file=sys.stderr, flush=True)
    return f"{type(error).__name__}: {line}"


def timing(what: str, taken: Sequence[float]) -> Row:
    return {
        f"{what}_s": statistics.median(taken),
        f"{what}_min_s": min(taken),
        f"{what}_n": len(taken),
    }


def compare(row: Row, ours: Row, case: Case, element: int) -> None:
    for i, what in enumerate(("forward", "both")):
        if f"{what}_s" in row and f"{what}_s" in ours:
            seconds = row[f"{what}_s"]
            row[f"{what}_ratio"] = seconds / ours[f"{what}_s"]
            row[f"{what}_bytes_per_s"] = case.moved[i] * element / seconds
            row[f"{what}_flops_per_s"] = case.flops[i] / seconds


def goals(case: Case, rows: Sequence[Row]) -> list[Row]:
    """Each goal of the case with what was reached, and the best of each kind beside ours."""
    ratios = {r["way"]: r["both_ratio"] for r in rows if "both_ratio" in r}
    found = []
    for ours in (OURS, COMPILED):
        alike = {n: r for n, r in ratios.items() if n in case.others and case.beside(n) == ours}
        if alike:
            best = min(alike, key=lambda name: alike[name])
            verdict = {"against": best, "goal": 1 / 1.1, "reached": alike[best], "best": True}
            found.append({"case": case.name, "beside": ours, **verdict})
    for name, goal in case.goals.items():
        if name in ratios:
            verdict = {"against": name, "goal": goal, "reached": ratios[name]}
            found.append({"case": case.name, "beside": case.beside(name), **verdict})
    return found


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log seconds over log length."""
    x, y = [math.log(n) for n in points], [math.log(s) for s in points.values()]
    mx, my = statistics.mean(x), statistics.mean(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / sum((a - mx) ** 2 for a in x)


def growth(module: ModuleType, device: torch.device, dtype: torch.dtype, rounds: int) -> Row:
    """Seconds, forward+backward, over T from 1k to 64k at fixed band."""
    calls = []
    for length in LENGTHS:
        case = module.growth(device, length)
        calls.append(both_call(case.ours, case.make(device, dtype)))
    taken = interleaved(calls, device, rounds)
    points = {n: statistics.median(t) for n, t in zip(LENGTHS, taken, strict=True)}
    return {"seconds": points, "slope": slope(points)}


def overhead(module: ModuleType, rounds: int) -> Row:
    """Microseconds that a call costs above the bare work, on CPU."""
    probe, device = module.overhead(), torch.device("cpu")
    inputs = probe.make()
    way = Way(probe.call)
    y = probe.forward(*inputs)
    dy = torch.ones_like(y)

    def work() -> None:
        with torch.no_grad():
            probe.forward(*inputs)

    def work_both() -> None:
        with torch.no_grad():
            probe.forward(*inputs)
            probe.backward(dy, *inputs)

    calls = [forward_call(way, inputs), work, both_call(way, inputs), work_both]
    times = [min(t) * 1e6 for t in interleaved(calls, device, rounds)]
    return {"forward_us": times[0] - times[1], "both_us": times[2] - times[3]}


def run_operator(name: str, module: ModuleType, args: argparse.Namespace) -> Iterator[Row]:
    """What is measured, a case at a time; with --case nothing but the rows of those cases."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    cases = module.cases(device)
    for case in reversed(cases) if device.type == "cuda" else cases:  # large ones matter there
        if not args.case or args.case in case.name:
            print(f"{name}: {case.name}", file=sys.stderr, flush=True)
            rows = measure_case(case, device, dtype, args.rounds)
            yield {"rows": rows, "goals": goals(case, rows)}
    if not args.case:
        yield {"growth": growth(module, device, dtype, args.rounds)}
    if device.type == "cpu" and not args.case:
        yield {"overhead": overhead(module, args.rounds)}


def merged(result: Row, part: Row, order: Sequence[str]) -> Row:
    """`result` with `part` in it: of a case that is measured again only the new rows stay."""
    again = {row["case"] for row in part.get("rows", [])}
    whole = result | part
    for key in ("rows", "goals"):
        kept = [row for row in result.get(key, []) if row["case"] not in again]
        whole[key] = sorted(kept + part.get(key, []), key=lambda row: order.index(row["case"]))
    return whole


def reached(holds: bool) -> str:
    return "reached" if holds else "MISSED"


def table(name: str, result: Row) -> str:
    ceiling = result["ceilings"]
    head = (
        "case | way | forward ms | x ours | fwd+bwd ms | x ours | GB/s | TFLOP/s | peak MB | error"
    )
    copied, product = ceiling["copy_bytes_per_s"] / 1e9, ceiling["matmul_flops_per_s"] / 1e12
    lines = [f"\n### {name}\n", f"Ceilings: copy {copied:.1f} GB/s, product {product:.3g} TFLOP/s"]
    lines += ["", f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for row in result["rows"]:
        if "missing" in row:
            cells = [row["case"], row["way"], f"not run: {row['missing']}", *[""] * 7]
        else:
            cells = [row["case"], row["way"], *cells_of(row, ceiling)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += structures(result["rows"], ceiling)
    lines.append("")
    for goal in result["goals"]:
        word = reached(goal["reached"] >= goal["goal"])
        kind = "best alternative" if goal.get("best") else "goal"
        beside = " to ours compiled" if goal.get("beside") == COMPILED else ""
        lines.append(
            f"- {goal['case']}: {goal['reached']:.2f} x {goal['against']} "
            f"({kind}{beside}, at least {goal['goal']:.3g}): {word}"
        )
    if "growth" in result:
        found = result["growth"]["slope"]
        lines.append(
            f"- slope of log time over log T, 1k to 64k: {found:.3f} "
            f"(goal, within {SLOPE} of 1): {reached(abs(found - 1) <= SLOPE)}"
        )
    if "overhead" in result:
        for what, most in CALL.items():
            found = result["overhead"][f"{what}_us"]
            lines.append(
                f"- a call above its work, {what}: {found:.1f} us "
                f"(goal, at most {most}): {reached(found <= most)}"
            )
    return "\n".join(lines)


def cells_of(row: Row, ceiling: dict[str, float]) -> list[str]:
    cells = []
    for what in ("forward", "both"):
        there = f"{what}_s" in row
        cells += [
            f"{row[f'{what}_s'] * 1e3:.3f}" if there else row.get("no_backward", "no backward"),
            f"{row[f'{what}_ratio']:.2f}" if there else "",
        ]
    what = "both" if "both_s" in row else "forward"
    for rate, top, unit in (("bytes", "copy_bytes", 1e9), ("flops", "matmul_flops", 1e12)):
        value = row[f"{what}_{rate}_per_s"]
        cells.append(f"{value / unit:.3g} ({value / ceiling[f'{top}_per_s']:.0%})")
    peak = f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else ""
    return [*cells, peak, f"{row['error']:.1e}"]


def plot(results: dict[str, Row], path: str) -> None:
    """Time over T in double logarithm, one line an operator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, result in results.items():
        points = result["growth"]["seconds"]
        label = f"{name}, slope {result['growth']['slope']:.2f}"
        lengths = [int(n) for n in points]  # keys of JSON are text
        axes.loglog(lengths, [s * 1e3 for s in points.values()], marker="o", label=label)
    axes.set(xlabel="length T", ylabel="forward+backward, ms")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = sorted(operators())
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--op", action="append", choices=known, help="an operator; all without it")
    p.add_argument("--case", help="only cases whose name contains this")
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    p.add_argument("--rounds", type=int, default=7, help="samples a way")
    p.add_argument("--json", help="add everything measured to this file")
    p.add_argument("--markdown", help="write the tables of all in the JSON file to this one")
    p.add_argument("--plot", metavar="PNG", help="draw the time over T from 1k to 64k")
    return p.parse_args(argv)


def collected(path: str | None, found: Row) -> Row:
    """Everything measured on this machine so far."""
    if path is None or not Path(path).exists():
        return {"machine": found, "operators": {}}
    whole: Row = json.loads(Path(path).read_text())
    if whole["machine"] != found:
        sys.exit(f"{path} was measured on {whole['machine']}, not {found}: name another file")
    return whole


def report(whole: Row) -> str:
    text = f"Measured on {', '.join(whole['machine'].values())}.\n"
    if whole["machine"]["kind"] == "cpu":
        text += "CUDA: not measured.\n"
    text += "x ours: seconds over those of ours; of compiled ways, over those of ours compiled.\n"
    return text + "\n".join(table(name, result) for name, result in whole["operators"].items())


def write(path: str, text: str) -> None:
    part = Path(f"{path}.part")
    part.write_text(text + "\n")
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    found = machine(device) | {"dtype": args.dtype}
    whole = collected(args.json, found)
    ceiling = ceilings(device, getattr(torch, args.dtype))
    failed: list[str] = []
    for name, module in operators().items():
        if args.op and name not in args.op:
            continue
        order = [case.name for case in module.cases(device)]
        for part in run_operator(name, module, args):
            failed += [f"{name}, {line}" for line in broken(part.get("rows", []))]
            before = whole["operators"].get(name, {})
            whole["operators"][name] = merged(before, part | {"ceilings": ceiling}, order)
            if args.json:  # a run that is cut off keeps what it has
                write(args.json, json.dumps(whole, indent=1))
    whole["operators"] = dict(sorted(whole["operators"].items()))
    print(report(whole))
    if args.markdown:
        write(args.markdown, report(whole))
    if args.plot:
        plot({n: r for n, r in whole["operators"].items() if "growth" in r}, args.plot)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
