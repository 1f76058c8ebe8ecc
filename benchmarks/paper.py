"""The tables of the AsymTrack paper as data, with the devices their speeds were measured on.

Source: Zhu et al., "Two-stream Beats One-stream: Asymmetric Siamese Network for Efficient Visual
Tracking", AAAI 2025. Speeds are frames per second of the model alone in PyTorch, fp32, batch 1
(Table 2's heading; Table 1's caption names the devices). ``None`` stands for the paper's dash.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from asymtrack_edge.variants import VARIANTS

Three = Tuple[Optional[float], Optional[float], Optional[float]]

#: The paper's machines by the columns of its tables.
MACHINES = {"gpu": "Nvidia GeForce RTX 2080 Ti", "cpu": "Intel i7-9700KF at 3.6 GHz", "agx": "Jetson AGX Xavier"}
#: Words that all occur in the name that a system reports for them, lower case.
_MARKS = {"gpu": ("2080 ti",), "cpu": ("i7-9700kf",), "agx": ("agx", "xavier")}


class Speeds(NamedTuple):
    """Frames per second on the paper's three machines."""

    gpu: Optional[float]
    cpu: Optional[float]
    agx: Optional[float]


#: Speeds of Table 1 by variant; ``variants.Published`` has the rest of the table.
TABLE_1: Dict[str, Speeds] = {
    name: Speeds(v.published.fps_gpu, v.published.fps_cpu, v.published.fps_agx) for name, v in VARIANTS.items()
}


class Comparison(NamedTuple):
    """A row of Table 2; accuracies in percent.

    Attributes:
        got10k: AO, SR 0.5, SR 0.75.
        lasot: AUC, normalised precision, precision.
        trackingnet: the same.
        real_time: in the table's upper part: at least 20 frames per second on the AGX Xavier.
    """

    tracker: str
    got10k: Three
    lasot: Three
    trackingnet: Three
    speeds: Speeds
    real_time: bool


_N = None

#: Table 2, in the paper's order.
TABLE_2: Tuple[Comparison, ...] = tuple(
    Comparison(name, got, lasot, net, Speeds(*speeds), real_time)
    for real_time, name, got, lasot, net, speeds in (
        (True, "AsymTrack-B", (67.7, 76.6, 61.4), (64.7, 73.0, 67.8), (80.0, 84.5, 77.4), (197, 38, 64)),
        (True, "AsymTrack-S", (65.5, 74.8, 58.9), (62.8, 71.2, 64.8), (77.9, 82.2, 74.0), (200, 75, 78)),
        (True, "AsymTrack-T", (62.3, 71.3, 54.7), (60.8, 68.7, 61.2), (76.2, 80.9, 71.6), (224, 81, 84)),
        (True, "HiT-Base", (64.0, 72.1, 58.1), (64.6, 73.3, 68.1), (80.0, 84.4, 77.3), (175, 33, 61)),
        (True, "TCTrack", (66.2, 75.6, 61.0), (60.5, 69.3, 62.4), (74.8, 79.6, 73.3), (140, 45, 41)),
        (True, "MixFormerV2", (61.9, 71.7, 51.3), (60.6, 69.9, 60.4), (75.8, 81.1, 70.4), (167, 45, 49)),
        (True, "HCAT", (65.1, 76.5, 56.7), (59.3, 68.7, 61.0), (76.6, 82.6, 72.9), (195, 45, 55)),
        (True, "HiT-Small", (62.6, 71.2, 54.4), (60.5, 68.3, 61.5), (77.7, 81.9, 73.1), (192, 72, 68)),
        (True, "E.T.Track", (_N, _N, _N), (59.1, _N, _N), (75.0, 80.3, 70.6), (40, 47, 20)),
        (True, "FEAR", (61.9, 72.2, _N), (53.5, _N, 54.5), (_N, _N, _N), (105, 60, 38)),
        (True, "LightTrack", (61.1, 71.0, _N), (53.8, _N, 53.7), (72.5, 77.8, 69.5), (128, 41, 36)),
        (True, "ATOM", (55.6, 63.4, 40.2), (51.5, 57.6, 50.5), (70.3, 77.1, 64.8), (83, 18, 22)),
        (True, "HiT-Tiny", (52.6, 59.3, 42.7), (54.8, 60.5, 52.9), (74.6, 78.1, 68.8), (204, 76, 77)),
        (True, "ECO", (31.6, 30.9, 11.1), (32.4, 33.8, 30.1), (55.4, 61.8, 49.2), (240, 15, 39)),
        (False, "ARTrack", (73.5, 82.2, 70.9), (70.4, 79.5, 76.6), (84.2, 88.7, 83.5), (26, 9, 8)),
        (False, "MixFormer-L", (75.6, 85.7, 72.8), (70.1, 79.9, 76.3), (83.9, 88.9, 83.1), (18, _N, _N)),
        (False, "TransT", (72.3, 82.4, 68.2), (64.9, 73.8, 69.0), (81.4, 86.7, 80.3), (63, 5, 13)),
        (False, "OSTrack-256", (71.0, 80.4, 68.2), (69.1, 78.7, 75.2), (83.1, 87.8, 82.0), (105, 11, 19)),
        (False, "Sim-B/16", (68.6, 78.9, 62.4), (69.3, 78.5, _N), (82.3, _N, 86.5), (87, 10, 16)),
        (False, "STARK-ST50", (68.0, 77.7, 62.3), (66.6, _N, _N), (81.3, 86.1, _N), (50, 7, 13)),
        (False, "TrSiam", (67.3, 78.7, 58.6), (62.4, _N, 60.6), (78.1, 82.9, 72.7), (40, 5, 10)),
        (False, "DiMP", (61.1, 71.7, 49.2), (56.9, 65.0, 56.7), (74.0, 80.1, 68.7), (77, 10, 17)),
        (False, "SiamFC++", (59.5, 69.5, 47.9), (54.5, _N, 54.7), (75.4, 80.0, 70.5), (_N, 12, _N)),
        (False, "SiamRPN++", (51.7, 61.6, 32.5), (49.6, 56.9, 49.1), (73.3, 80.0, 69.4), (56, 4, 11)),
    )
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

    number: int
    etm: bool
    ope: bool
    speeds: Speeds
    got10k_ao: float
    lasot_auc: float

    @property
    def label(self) -> str:
        """Short name, for example ``"2: ETM"``."""
        parts = [name for name, on in (("ETM", self.etm), ("OPE", self.ope)) if on]
        return f"{self.number}: {' + '.join(parts) or 'neither'}"


#: Table 4.
TABLE_4: Tuple[Component, ...] = (
    Component(1, False, False, Speeds(260, 95, 100), 60.4, 58.8),
    Component(2, True, False, Speeds(220, 80, 82), 62.9, 61.2),
    Component(3, False, True, Speeds(240, 86, 92), 62.1, 60.7),
    Component(4, True, True, Speeds(200, 75, 78), 64.4, 62.5),
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
        machine: ``cpu``, ``gpu`` and ``board`` as the system reports them; None where there is none.
        device: ``"cpu"`` or ``"cuda:N"``: where the network ran.

    Returns:
        Key of ``MACHINES``, and whether the machine is the paper's own.
    """
    on_gpu = device.startswith("cuda")
    jetson = "jetson" in (machine["board"] or "").lower()
    key = "agx" if jetson else "gpu" if on_gpu else "cpu"
    name = (machine["board" if jetson else key] or "").lower()
    return key, all(mark in name for mark in _MARKS[key]) and (on_gpu or not jetson)


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
            [(t.tracker, *t.got10k, *t.lasot, *t.trackingnet, *t.speeds) for t in TABLE_2],
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
