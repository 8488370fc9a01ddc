"""How `densebridge cost` looks on the terminal: a line a stage, whence every number is, and what is left open."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .model import GB, Costs, Figure, Prices, StageCost
from .requests import Requests

MARKS = {"measured": "m", "stated": "s", "assumed": "a"}
WIDTH = 130  # columns that the table needs: where the terminal has fewer, wrapped lines are better than cut numbers


def print_costs(costs: Costs, prices: Prices, *, gpu: str) -> None:
    """The table, then what to know about it."""
    console = Console(width=max(WIDTH, Console().width))
    console.print(_stage_table(costs, prices, gpu))
    if costs.phases:
        console.print(_phase_table(costs, prices, gpu))
    _print_time(costs, gpu)
    _print_money(costs, prices)
    _print_origins(costs)


def _stage_table(costs: Costs, prices: Prices, gpu: str) -> Table:
    title = f"{costs.rows:,.0f} rows in {costs.partitions:,} partitions"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    money = (*(("money",) if prices.any_once else ()), *(("a month",) if prices.gb_month is not None else ()))
    for name in (
        "stage",
        "rows in",
        "goes on",
        "rows/s each",
        f"{gpu}-h",
        "CPU-h",
        "GB",
        "M requests",
        "hours",
        *money,
    ):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    source = costs.source_requests
    row = _money(prices, prices.total(requests=source), prices.month(costs.rows * costs.source.value))
    size = f"{_number(costs.rows * costs.source.value / GB)} {MARKS[costs.source.origin]}"
    table.add_row("(source)", f"{costs.rows:,.0f}", "", "", "", "", size, _number(_millions(source)), "", *row)
    for cost in costs.stages:
        table.add_row(*_stage_row(cost), *_money(prices, prices.of(cost), prices.month(cost.stored_bytes)))
    stored = costs.stored_bytes
    table.add_section()
    table.add_row(
        "in all",
        "",
        "",
        "",
        _number(costs.gpu_hours),
        _number(costs.cpu_hours),
        _number(None if stored is None else stored / GB),
        _number(_millions(costs.requests)),
        _number(costs.wall.seconds / 3600),
        *_money(prices, costs.money(prices), prices.month(stored)),
    )
    return table


def _stage_row(cost: StageCost) -> list[str]:
    figures, stored, wall = cost.figures, cost.stored_bytes, cost.wall_seconds
    return [
        cost.stage.name,
        f"{cost.rows:,.0f}",
        f"{figures.keep.value:.3f} {MARKS[figures.keep.origin]}",
        _figure(figures.rate),
        _number(cost.gpu_hours),
        _number(cost.cpu_hours),
        "?" if stored is None or figures.size is None else f"{_number(stored / GB)} {MARKS[figures.size.origin]}",
        _number(_millions(cost.requests)),
        _number(None if wall is None else wall / 3600),
    ]


def _phase_table(costs: Costs, prices: Prices, gpu: str) -> Table:
    table = Table(title="trainings", title_justify="left", box=box.SIMPLE)
    money = ("money",) if prices.gpu_hour is not None else ()
    for name in ("phase", "samples", "samples/s a GPU", f"{gpu}-h", *money):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in costs.phases:
        told = (_number(prices.total(gpu_hours=phase.gpu_hours)),) if money else ()
        table.add_row(phase.name, f"{phase.samples:,}", _figure(phase.rate), _number(phase.gpu_hours), *told)
    return table


def _print_time(costs: Costs, gpu: str) -> None:
    wall = costs.wall
    if wall.slowest:
        why = "with the most actors of every pool" if wall.limit == "pools" else f"by the {wall.limit} that there are"
        print(f"time: {_number(wall.seconds / 3600)} hours {why}; the others wait for {wall.slowest}")
    if costs.held_gpu_hours > costs.gpu_hours > 0:
        held = f"{_number(costs.gpu_hours)} {gpu}-hours are work; pools at their most all the time would hold"
        print(f"{held} {_number(costs.held_gpu_hours)}, and the bill is between")
    if costs.without_rate:
        print(
            f"no rate is known of {', '.join(costs.without_rate)}: left out of hours and time; state --rate NAME=ROWS_A_SECOND"
        )
    open_phases = [phase.name for phase in costs.phases if not phase.rate]
    if open_phases:
        print(f"no speed is assumed of a training: state --rate {open_phases[0]}=SAMPLES_A_SECOND of one GPU")


def _print_money(costs: Costs, prices: Prices) -> None:
    names = {
        "gpu_hour": "GPUs (--gpu NAME=)",
        "cpu_hour": "cores (--cpu-hour)",
        "million_reads": "requests (--requests-million)",
        "gb_read": "reading from elsewhere (--egress)",
        "gb_month": "storage (--storage-month)",
    }
    left_out = [told for name, told in names.items() if getattr(prices, name) is None]
    if left_out:
        print(f"no price, so in no money: {', '.join(left_out)}")
    unsized = [cost.stage.name for cost in costs.stages if cost.figures.size is None]
    if unsized:
        print(f"no size is known of what {', '.join(unsized)} writes: state --size NAME=BYTES_A_ROW")


def _print_origins(costs: Costs) -> None:
    print("m measured in this dataset (rates: on the machines of those builds), s stated, a assumed:")
    told = dict.fromkeys(
        (cost.stage.name, figure.source)
        for cost in costs.stages
        for figure in (cost.figures.rate, cost.figures.keep, cost.figures.size)
        if figure and figure.origin == "assumed" and figure.source
    )
    for name, source in told:
        print(f"  {name}: {source}")
    print("not in it: what Ray and the engine take beside the stages' own work, and what changed rows would reuse")


def _money(prices: Prices, once: float | None, month: float | None) -> list[str]:
    """The columns that the prices give."""
    return [
        *([_number(once)] if prices.any_once else []),
        *([_number(month)] if prices.gb_month is not None else []),
    ]


def _figure(figure: Figure | None) -> str:
    return f"{_number(figure.value)} {MARKS[figure.origin]}" if figure else "?"


def _millions(requests: Requests) -> float:
    return (requests.reads + requests.writes) / 1e6


def _number(value: float | None) -> str:
    """Three digits, and all that stand before the point; `?` for what is not known."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
