"""The tables of a study as a figure: each member's KL by arm, and what the arm computed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.storage.files import atomic_file
from elastic.study.compare import Row

INCHES_PER_ARM = 0.36
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "elastic",  # the same figures give the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plot(path: Path, rows: Sequence[Row], cost: Mapping[str, Mapping[str, float]]) -> None:
    """SVG of two panels that share their rows, an arm each, the first on top.

    Left, on a logarithmic axis, the KL of each member, with twice its standard error over documents
    and a small mark for each seed; members that are the parent, without any, are left out. Right
    the FLOPs of students and teacher of one seed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    arms = list(dict.fromkeys(row.arm for row in rows))
    budgets = list(dict.fromkeys(row.budget for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + INCHES_PER_ARM * len(arms)), layout="constrained")
        kl, work = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        for number, budget in enumerate(budgets):
            shown = [row for row in rows if row.budget == budget and row.kl[0] > 0]
            color, label = f"C{number}", budget
            for row in shown:
                place = arms.index(row.arm)
                kl.errorbar(
                    row.kl[0], place, xerr=2 * row.kl[1], fmt="o", color=color, label=label,
                    markersize=5, capsize=2,
                )  # fmt: skip
                label = "_nolegend_"
                kl.plot(
                    row.by_seed, [place + 0.25] * len(row.by_seed), "|", color=color, markersize=5
                )
        kl.set_xscale("log")
        kl.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        kl.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        kl.xaxis.set_minor_formatter(NullFormatter())
        kl.set_yticks(range(len(arms)), arms)
        kl.invert_yaxis()
        kl.set_xlabel("KL to the parent, nats per token (bars: two standard errors; ticks: seeds)")
        kl.grid(axis="x", which="both", alpha=0.2)
        handles, labels = kl.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(budgets), frameon=False)
        students = [cost[arm]["student_flops"] / 1e12 for arm in arms]
        teachers = [cost[arm]["teacher_flops"] / 1e12 for arm in arms]
        work.barh(range(len(arms)), students, color="0.45", height=0.5, label="students")
        work.barh(
            range(len(arms)), teachers, left=students, color="0.8", height=0.5, label="teacher"
        )
        work.tick_params(left=False)
        work.set_xlabel("TFLOPs of one seed")
        handles, labels = work.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
