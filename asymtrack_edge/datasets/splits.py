"""Facts about the data sets that their folders do not hold: frame ranges, attribute names.

Sources: UAV123's ``configSeqs.m``
(Mueller et al., ECCV 2016); the OTB toolkit's sequence list and its ``initOmit`` folder (Wu et al.,
TPAMI 2015); the lists of attributes of the three toolkits.
"""

from __future__ import annotations

from typing import Dict, Tuple

#: UAV123 cuts some recordings into several sequences: folder -> first frame (from 1) of part 1, 2, ...
#: Sequence ``bird1_2`` is part 2 of folder ``bird1``; its length is that of its annotation.
UAV123_PARTS: Dict[str, Tuple[int, ...]] = {
    "bird1": (1, 775, 1573),
    "car1": (1, 751, 1627),
    "car6": (1, 487, 1807, 2953, 3925),
    "car8": (1, 1357),
    "car16": (1, 415),
    "group1": (1, 1333, 2515, 3925),
    "group2": (1, 907, 1771),
    "group3": (1, 1567, 2827, 4369),
    "person2": (1, 1189),
    "person4": (1, 1501),
    "person5": (1, 877),
    "person7": (1, 1249),
    "person8": (1, 1075),
    "person12": (1, 601),
    "person14": (1, 847, 1813),
    "person17": (1, 1501),
    "person19": (1, 1243, 2791),
    "truck4": (1, 577),
    "uav1": (1, 1555, 2473),
}

#: OTB sequences whose annotation covers only some of the images: first and last image, counted from 1.
OTB_RANGES: Dict[str, Tuple[int, int]] = {
    "David": (300, 770),
    "Football1": (1, 74),
    "Freeman3": (1, 460),
    "Freeman4": (1, 283),
    "Diving": (1, 215),
}

#: OTB sequences whose first annotated frames the toolkit leaves out.
OTB_OMITTED: Dict[str, int] = {"Tiger1": 5}

#: Meaning of the 0/1 columns of each toolkit's attribute files.
OTB_ATTRIBUTES = ("IV", "OPR", "SV", "OCC", "DEF", "MB", "FM", "IPR", "OV", "BC", "LR")
LASOT_ATTRIBUTES = ("IV", "POC", "DEF", "MB", "CM", "ROT", "BC", "VC", "SV", "FOC", "FM", "OV", "LR", "ARC")
UAV123_ATTRIBUTES = ("SV", "ARC", "LR", "FM", "FOC", "POC", "OV", "BC", "IV", "VC", "CM", "SOB")
