"""Facts about the data sets that their folders do not hold: splits, frame ranges, attribute names.

Sources: UAV123's ``configSeqs.m`` (Mueller et al., ECCV 2016); the OTB toolkit's sequence list and its
``initOmit`` folder (Wu et al., TPAMI 2015); the lists of attributes of the three toolkits; LaSOT's
``testing_set.txt`` (Fan et al., CVPR 2019, protocol II).
"""

from __future__ import annotations

from typing import Dict, Tuple


def _numbers(text: str) -> Dict[str, Tuple[int, ...]]:
    """``name:1,2,3`` by name."""
    entries = (entry.partition(":") for entry in text.split())
    return {name: tuple(map(int, numbers.split(","))) for name, _, numbers in entries}


#: UAV123 cuts some recordings into several sequences: folder -> first frame (from 1) of part 1, 2, ...
#: Sequence ``bird1_2`` is part 2 of folder ``bird1``; its length is that of its annotation.
UAV123_PARTS = _numbers("""
bird1:1,775,1573 car1:1,751,1627 car6:1,487,1807,2953,3925 car8:1,1357 car16:1,415 group1:1,1333,2515,3925
group2:1,907,1771 group3:1,1567,2827,4369 person2:1,1189 person4:1,1501 person5:1,877 person7:1,1249
person8:1,1075 person12:1,601 person14:1,847,1813 person17:1,1501 person19:1,1243,2791 truck4:1,577
uav1:1,1555,2473
""")

#: OTB sequences whose annotation covers only some of the images: first and last image, counted from 1.
OTB_RANGES = _numbers("David:300,770 Football1:1,74 Freeman3:1,460 Freeman4:1,283 Diving:1,215")

#: OTB sequences whose first annotated frames the toolkit leaves out.
OTB_OMITTED: Dict[str, int] = {"Tiger1": 5}

#: Meaning of the 0/1 columns of each toolkit's attribute files.
OTB_ATTRIBUTES = ("IV", "OPR", "SV", "OCC", "DEF", "MB", "FM", "IPR", "OV", "BC", "LR")
LASOT_ATTRIBUTES = ("IV", "POC", "DEF", "MB", "CM", "ROT", "BC", "VC", "SV", "FOC", "FM", "OV", "LR", "ARC")
UAV123_ATTRIBUTES = ("SV", "ARC", "LR", "FM", "FOC", "POC", "OV", "BC", "IV", "VC", "CM", "SOB")

_LASOT_TEST = _numbers("""
airplane:1,9,13,15 basketball:1,6,7,11 bear:2,4,6,17 bicycle:2,7,9,18 bird:2,3,15,17 boat:3,4,12,17 book:3,10,11,19
bottle:1,12,14,18 bus:2,5,17,19 car:2,6,9,17 cat:1,3,18,20 cattle:2,7,12,13 chameleon:3,6,11,20 coin:3,6,7,18
crab:3,6,12,18 crocodile:3,4,10,14 cup:1,4,7,17 deer:4,8,10,14 dog:1,7,15,19 drone:2,7,13,15 electricfan:1,10,18,20
elephant:1,12,16,18 flag:2,3,5,9 fox:2,3,5,20 frog:3,4,9,20 gametarget:1,2,7,13 gecko:1,5,16,19 giraffe:2,10,13,15
goldfish:3,7,8,10 gorilla:4,6,9,13 guitar:3,8,10,16 hand:2,3,9,16 hat:1,2,5,18 helmet:5,11,13,19 hippo:1,7,9,20
horse:1,4,12,15 kangaroo:2,5,11,14 kite:4,6,10,15 leopard:1,7,16,20 licenseplate:6,12,13,15 lion:1,5,12,20
lizard:1,3,6,13 microphone:2,6,14,16 monkey:3,4,9,17 motorcycle:1,3,9,18 mouse:1,8,9,17 person:1,5,10,12
pig:2,10,13,18 pool:3,7,12,15 rabbit:10,13,17,19 racing:10,15,16,20 robot:1,5,8,19 rubicCube:1,6,14,19
sepia:6,8,13,16 shark:2,3,5,6 sheep:3,5,7,9 skateboard:3,8,16,19 spider:14,16,18,20 squirrel:8,11,13,19
surfboard:4,5,8,12 swing:10,14,17,20 tank:6,9,14,16 tiger:4,6,12,18 train:1,7,11,20 truck:3,6,7,16 turtle:5,8,9,16
umbrella:2,9,17,19 volleyball:1,13,18,19 yoyo:7,15,17,19 zebra:10,14,16,17
""")

#: The 280 sequences of LaSOT's test split; all others are for training.
LASOT_TEST = tuple(f"{category}-{number}" for category, numbers in _LASOT_TEST.items() for number in numbers)
