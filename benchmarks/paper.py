"""The tables of the AsymTrack paper as data, with the devices their speeds were measured on.

Source: Zhu et al., "Two-stream Beats One-stream: Asymmetric Siamese Network for Efficient Visual
Tracking", AAAI 2025. Speeds are frames per second of the model alone in PyTorch, fp32, batch 1
(Table 2's heading; Table 1's caption names the devices). ``None`` stands for the paper's dash.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.machine import title
from asymtrack_edge.benchmarks.speed.report import NETWORK, Row
from asymtrack_edge.variants import VARIANTS, Variant

#: The paper's machines by the columns of its tables.
MACHINES = {"gpu": "Nvidia GeForce RTX 2080 Ti", "cpu": "Intel i7-9700KF at 3.6 GHz", "agx": "Jetson AGX Xavier"}
#: Words that all occur in the name that a system reports for them, lower case.
_MARKS = {"gpu": ("2080 ti",), "cpu": ("i7-9700kf",), "agx": ("agx", "xavier")}


class Speeds(NamedTuple):
    """Frames per second on the paper's three machines."""

    gpu: float
    cpu: float
    agx: float


#: Speeds of Table 1 by variant; ``variants.Published`` has the rest of the table.
TABLE_1: Dict[str, Speeds] = {
    name: Speeds(v.published.fps_gpu, v.published.fps_cpu, v.published.fps_agx) for name, v in VARIANTS.items()
}

#: Table 2, in the paper's order: accuracies in percent on GOT-10k (AO, SR 0.5, SR 0.75), LaSOT and TrackingNet
#: (AUC, normalised precision, precision), and frames per second.
TABLE_2: Tuple[Tuple[Any, ...], ...] = (
    ("AsymTrack-B", 67.7, 76.6, 61.4, 64.7, 73.0, 67.8, 80.0, 84.5, 77.4, 197, 38, 64),
    ("AsymTrack-S", 65.5, 74.8, 58.9, 62.8, 71.2, 64.8, 77.9, 82.2, 74.0, 200, 75, 78),
    ("AsymTrack-T", 62.3, 71.3, 54.7, 60.8, 68.7, 61.2, 76.2, 80.9, 71.6, 224, 81, 84),
    ("HiT-Base", 64.0, 72.1, 58.1, 64.6, 73.3, 68.1, 80.0, 84.4, 77.3, 175, 33, 61),
    ("TCTrack", 66.2, 75.6, 61.0, 60.5, 69.3, 62.4, 74.8, 79.6, 73.3, 140, 45, 41),
    ("MixFormerV2", 61.9, 71.7, 51.3, 60.6, 69.9, 60.4, 75.8, 81.1, 70.4, 167, 45, 49),
    ("HCAT", 65.1, 76.5, 56.7, 59.3, 68.7, 61.0, 76.6, 82.6, 72.9, 195, 45, 55),
    ("HiT-Small", 62.6, 71.2, 54.4, 60.5, 68.3, 61.5, 77.7, 81.9, 73.1, 192, 72, 68),
    ("E.T.Track", None, None, None, 59.1, None, None, 75.0, 80.3, 70.6, 40, 47, 20),
    ("FEAR", 61.9, 72.2, None, 53.5, None, 54.5, None, None, None, 105, 60, 38),
    ("LightTrack", 61.1, 71.0, None, 53.8, None, 53.7, 72.5, 77.8, 69.5, 128, 41, 36),
    ("ATOM", 55.6, 63.4, 40.2, 51.5, 57.6, 50.5, 70.3, 77.1, 64.8, 83, 18, 22),
    ("HiT-Tiny", 52.6, 59.3, 42.7, 54.8, 60.5, 52.9, 74.6, 78.1, 68.8, 204, 76, 77),
    ("ECO", 31.6, 30.9, 11.1, 32.4, 33.8, 30.1, 55.4, 61.8, 49.2, 240, 15, 39),
    # The table's lower part: below 20 frames per second on the AGX Xavier.
    ("ARTrack", 73.5, 82.2, 70.9, 70.4, 79.5, 76.6, 84.2, 88.7, 83.5, 26, 9, 8),
    ("MixFormer-L", 75.6, 85.7, 72.8, 70.1, 79.9, 76.3, 83.9, 88.9, 83.1, 18, None, None),
    ("TransT", 72.3, 82.4, 68.2, 64.9, 73.8, 69.0, 81.4, 86.7, 80.3, 63, 5, 13),
    ("OSTrack-256", 71.0, 80.4, 68.2, 69.1, 78.7, 75.2, 83.1, 87.8, 82.0, 105, 11, 19),
    ("Sim-B/16", 68.6, 78.9, 62.4, 69.3, 78.5, None, 82.3, None, 86.5, 87, 10, 16),
    ("STARK-ST50", 68.0, 77.7, 62.3, 66.6, None, None, 81.3, 86.1, None, 50, 7, 13),
    ("TrSiam", 67.3, 78.7, 58.6, 62.4, None, 60.6, 78.1, 82.9, 72.7, 40, 5, 10),
    ("DiMP", 61.1, 71.7, 49.2, 56.9, 65.0, 56.7, 74.0, 80.1, 68.7, 77, 10, 17),
    ("SiamFC++", 59.5, 69.5, 47.9, 54.5, None, 54.7, 75.4, 80.0, 70.5, None, 12, None),
    ("SiamRPN++", 51.7, 61.6, 32.5, 49.6, 56.9, 49.1, 73.3, 80.0, 69.4, 56, 4, 11),
)

#: Table 3, in the paper's order: AUC in percent on NfS, UAV123 and LaSOT-ext.
TABLE_3: Tuple[Tuple[str, Optional[float], Optional[float], Optional[float]], ...] = (
    ("AsymTrack-B", 64.4, 66.5, 44.6),
    ("AsymTrack-S", 64.9, 65.6, 43.3),
    ("AsymTrack-T", 63.3, 64.6, 42.5),
    ("MixFormerV2", None, 65.8, 43.6),
    ("HiT-Base", 63.6, 65.6, 44.1),
    ("HCAT", 63.5, 62.7, None),
    ("HiT-Small", 61.8, 63.3, 40.4),
    ("E.T.Track", 59.0, 62.3, None),
    ("FEAR", 61.4, None, None),
    ("ATOM", 58.4, 64.2, 37.6),
    ("LightTrack", 55.3, 62.5, None),
    ("HiT-Tiny", 53.2, 58.7, 35.8),
    ("ECO", 46.6, 53.2, 22.0),
    ("GRM", 65.6, 70.2, None),
    ("ARTrack", 64.3, 67.7, 46.4),
    ("OSTrack-256", 64.7, 68.3, 47.4),
    ("TrSiam", 65.8, 67.4, None),
    ("TransT", 65.7, 69.1, None),
    ("PrDiMP", 63.5, 68.0, None),
    ("DiMP", 62.0, 65.3, 39.2),
    ("SiamRPN++", 50.2, 61.6, 34.0),
)


class Component(NamedTuple):
    """A row of Table 4 (AsymTrack-S): which modules are on, speeds, GOT-10k AO and LaSOT AUC."""

    label: str
    etm: bool
    ope: bool
    speeds: Speeds
    got10k_ao: float
    lasot_auc: float

    @property
    def variant(self) -> Variant:
        """AsymTrack-S with these modules."""
        s = VARIANTS["S"]
        return s.with_(etm_stages=s.etm_stages if self.etm else (), ope_stages=s.ope_stages if self.ope else ())


#: Table 4.
TABLE_4: Tuple[Component, ...] = (
    Component("1: neither", False, False, Speeds(260, 95, 100), 60.4, 58.8),
    Component("2: ETM", True, False, Speeds(220, 80, 82), 62.9, 61.2),
    Component("3: OPE", False, True, Speeds(240, 86, 92), 62.1, 60.7),
    Component("4: ETM + OPE", True, True, Speeds(200, 75, 78), 64.4, 62.5),
)

#: Table 5a, designs of ETM (AsymTrack-S): GOT-10k AO and LaSOT AUC in percent.
TABLE_5A: Tuple[Tuple[str, float, float], ...] = (
    ("baseline", 64.4, 62.5),
    ("DTM -> MHCA", 64.1, 62.6),
    ("without prototype attention", 63.9, 62.3),
    ("with ETM in stage 1 too", 64.6, 62.4),
)

#: Table 5b, stages with OPE: the same.
TABLE_5B: Tuple[Tuple[str, float, float], ...] = (
    ("baseline (stages 1, 2, 3)", 64.4, 62.5),
    ("stages 1, 2", 64.2, 62.2),
    ("stage 1", 63.9, 61.9),
    ("stage 3", 63.3, 61.4),
)


def column_for(machine: Mapping[str, Any], device: str) -> Tuple[str, bool]:
    """Which of the paper's columns a measurement is to be read beside.

    Args:
        machine: ``machine.facts``.
        device: ``"cpu"`` or ``"cuda:N"``: where the network ran.

    Returns:
        Key of ``MACHINES``, and whether the machine is the paper's own.
    """
    on_gpu = device.startswith("cuda")
    jetson = "jetson" in (machine["board"] or "").lower()
    key = "agx" if jetson else "gpu" if on_gpu else "cpu"
    name = (machine["board" if jetson else key] or "").lower()
    return key, all(mark in name for mark in _MARKS[key]) and (on_gpu or not jetson)


def beside_table_1(rows: Sequence[Row]) -> List[Row]:
    """Measured speeds of published variants beside Table 1 (which Table 2 repeats)."""
    lines = []
    for row in rows:
        name = row["case"]["tracker"].replace("AsymTrack-", "")
        if row["protocol"] == NETWORK and name in TABLE_1 and row["case"]["batch"] == 1:
            lines.append(_beside("1, 2", f"AsymTrack-{name}, fps", row, row["fps"], TABLE_1[name]))
    return lines


def beside_table_4(rows: Sequence[Row], ratios: Sequence[Row]) -> List[Row]:
    """Speed of each model of Table 4, in its order, over that of model 4, measured and published.

    Measured ratios are medians over the rounds of a race: they hold on a busy machine too.
    """
    measured = {ratio["name"]: ratio["speedup"] for ratio in ratios}
    lines = []
    for row, model in zip(rows, TABLE_4):
        share = measured.get(row["case"]["name"], 1.0)
        lines.append(_beside("4", "speed over model 4's", row, share, model.speeds, TABLE_4[3].speeds))
    return lines


def _beside(table: str, what: str, row: Row, measured: float, speeds: Speeds, over: Optional[Speeds] = None) -> Row:
    key, same = column_for(row["machine"], row["case"]["device"])
    published = getattr(speeds, key) / (getattr(over, key) if over else 1)
    return {
        "table": table,
        "what": what,
        "name": row["case"]["name"],
        "measured": measured,
        "published": published,
        "ratio": measured / published,
        "paper_machine": MACHINES[key],
        "machine": title(row["machine"]),
        "same_machine": same,
    }


def tables() -> List[Tuple[str, Sequence[str], List[Sequence[Any]]]]:
    """All five tables as the paper prints them: title, header and rows; None stands for a dash."""
    machines = ", ".join(f"{key.upper()}: {name}" for key, name in MACHINES.items())
    accuracies = ("GOT-10k AO", "LaSOT AUC")
    speeds = ("GPU fps", "CPU fps", "AGX fps")
    return [
        (
            f"Table 1: variants ({machines}; PyTorch, fp32, model only)",
            ("variant", "blocks", "crops px", *speeds, "params M", "FLOPs G"),
            [
                (f"AsymTrack-{n}", ",".join(map(str, v.depths)), f"{v.template_size}/{v.search_size}", *TABLE_1[n],
                 v.published.params_m, v.published.flops_g)
                for n, v in VARIANTS.items()
            ],
        ),
        (
            "Table 2: state of the art",
            ("tracker", "GOT-10k AO", "SR0.5", "SR0.75", "LaSOT AUC", "LaSOT PNorm", "LaSOT P", "TrackingNet AUC",
             "TrackingNet PNorm", "TrackingNet P", *speeds),
            list(TABLE_2),
        ),
        ("Table 3: more benchmarks (AUC)", ("tracker", "NFS", "UAV123", "LaSOText"), list(TABLE_3)),
        (
            "Table 4: components of AsymTrack-S",
            ("model", *speeds, *accuracies),
            [(c.label, *c.speeds, c.got10k_ao, c.lasot_auc) for c in TABLE_4],
        ),
        ("Table 5a: designs of ETM", ("method", *accuracies), list(TABLE_5A)),
        ("Table 5b: stages with OPE", ("method", *accuracies), list(TABLE_5B)),
    ]  # fmt: skip
